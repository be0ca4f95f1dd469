"""The order of examples, and batches made of them. Next: `../training/trainer.py`.

One idea: the batch of a step is a function of the seed and the step, so a resumed run sees what it would have seen.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from hybrid_opt.errors import UserError
from hybrid_opt.noise.keys import Key


def hold_out(examples: Sequence[Any], fraction: float, seed: int, at_end: bool) -> tuple[list[Any], list[Any]]:
    """Examples to train on, and a fraction of them to hold out: the last ones of a running text, else random ones.

    Raises:
        UserError: one side would have no examples.
    """
    count = round(len(examples) * fraction)
    if count in (0, len(examples)):
        raise UserError(f"data.validation: {fraction} of {len(examples)} examples leaves one side without any")
    if at_end:
        return list(examples[:-count]), list(examples[-count:])
    generator = np.random.Generator(np.random.Philox(Key((seed, "held out")).seed()))
    chosen = set(generator.permutation(len(examples))[:count].tolist())
    kept, held = ([e for i, e in enumerate(examples) if (i in chosen) == side] for side in (False, True))
    return kept, held


def length_of(example: Any) -> int:
    """Tokens of an example of a run's data, prompt and completion together."""
    return len(example.prompt) + len(getattr(example, "completion", ()))


class Batches(Protocol):
    """A batch for every step."""

    def batch_at(self, step: int) -> Any:
        """The batch of a step (0-based)."""
        ...


class ShuffledBatches:
    """Batches drawn without replacement, in a new order each time through the examples.

    Examples that do not fill a last batch are left out of that time through.
    """

    def __init__(
        self, examples: Sequence[Any], batch_size: int, collate: Callable[[Sequence[Any]], Any], seed: int
    ) -> None:
        self.examples = examples
        self.batch_size = min(batch_size, len(examples))
        self.collate = collate
        self.key = Key((seed, "order"))
        self._epoch, self._order = -1, np.arange(0)

    def batch_at(self, step: int) -> Any:
        """See `Batches.batch_at`."""
        epoch, place = divmod(step, len(self.examples) // self.batch_size)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(self.key.fold(epoch).seed()))
            self._epoch, self._order = epoch, generator.permutation(len(self.examples))
        chosen = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        return self.collate([self.examples[i] for i in chosen])

    def largest(self) -> Any:
        """A batch of the longest examples, as none of the others takes more memory."""
        return self.collate(sorted(self.examples, key=length_of)[-self.batch_size :])


class IterableBatches:
    """A user's own iterable of batches, started again when it ends. Steps are asked for in order."""

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterable = iterable
        self._next, self._iterator = 0, iter(iterable)

    def batch_at(self, step: int) -> Any:
        """See `Batches.batch_at`; a later step than the next skips batches.

        Raises:
            UserError: the iterable gives nothing, or (a generator) nothing any more.
        """
        while True:
            batch = self._draw()
            self._next += 1
            if self._next > step:
                return batch

    def _draw(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self.iterable)
        try:
            return next(self._iterator)
        except StopIteration:
            raise UserError(
                f"batches: the iterable ended after {self._next} batches and does not start again; pass a list, a "
                "DataLoader, or a generator without end"
            ) from None


def as_batches(batches: Iterable[Any] | Batches) -> Batches:
    """Batches from an iterable; Batches as they are."""
    return batches if hasattr(batches, "batch_at") else IterableBatches(batches)
