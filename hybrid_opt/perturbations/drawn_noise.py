"""Noise that was drawn for a step's evaluation, for its update to find again. Next: `../estimators/probing.py`.

One idea: keys are all that must be kept, and drawing noise again gives the same values; what is kept saves time only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_opt.config.perturbations import KEPT_NOISE
from hybrid_opt.noise.keys import Key


class DrawnNoise:
    """The noise of a step's members by parameter, as far as it takes little memory."""

    def __init__(self) -> None:
        self._memory: list[Tensor] = []
        self.forget()

    def forget(self) -> None:
        """Begin a new step."""
        self._used = 0
        self._pieces: dict[str, list[list[Tensor]]] = {}
        self._directions: dict[str, list[Key]] = {}
        self._bytes = 0

    def memory(self, keys: int, count: int, device: torch.device) -> Tensor | None:
        """Memory (keys, count) float32 that the step before used at this place, or new memory that the next one will find.

        New memory would take longer to get from the operating system than to be filled. None: there is no room to keep it.
        """
        self._bytes += 4 * keys * count
        if self._bytes > KEPT_NOISE:
            return None
        if self._used == len(self._memory) or self._memory[self._used].shape != (keys, count):
            del self._memory[self._used :]
            self._memory.append(torch.empty(keys, count, device=device))
        self._used += 1
        return self._memory[self._used - 1]

    def keep(self, names: Sequence[str], directions: list[Key], drawn: Sequence[Tensor]) -> None:
        """Noise of several parameters, one or two tensors (names, directions, ...)."""
        if self._bytes > KEPT_NOISE:
            self._pieces.clear()
            self._directions.clear()
            return
        for name, *noise in zip(names, *drawn, strict=True):
            self._pieces.setdefault(name, []).append(noise)
            self._directions.setdefault(name, []).extend(directions)

    def recall(self, keys: Sequence[Key], name: str, first: int, last: int) -> list[Tensor] | None:
        """The noise for all the keys, the first tensor's last dimension cut to `first` to `last`; None if some is not here.

        The keys are the first ones that were kept, in the same order; what was kept beyond them is left out.
        """
        if name not in self._pieces or self._directions[name][: len(keys)] != list(keys):
            return None
        first_tensor, *others = (
            (torch.cat(parts) if len(parts) > 1 else parts[0])[: len(keys)]
            for parts in zip(*self._pieces[name], strict=True)
        )
        return [first_tensor[..., first:last], *others]
