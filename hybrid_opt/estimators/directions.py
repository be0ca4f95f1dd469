"""Where dense directions come from: the rows that a perturbation adds to the weights. Next: `mixed_directions.py`, then `dense.py`.

One idea: a direction has a value for each element of each parameter and is named by a key. What makes directions of others (scales
them, makes them orthogonal, mixes gradients in) is again a source of directions, so whoever perturbs the weights need not know.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine, whole_shape
from hybrid_opt.estimators.noise import DISTRIBUTIONS, Key, StepKey


class Directions(Protocol):
    """A source of directions."""

    def ready(self, engine: Engine, names: Collection[str], keys: Sequence[Key], key: StepKey) -> "Directions":
        """The source for one step, once it is known which parameters it perturbs along which directions; all ranks together."""
        ...

    def dimension(self, engine: Engine, names: Collection[str]) -> int:
        """How many of these parameters' values directions can move, on all ranks together."""
        ...

    def read(self, keys: Sequence[Key], name: str, start: int, count: int, device: torch.device) -> Tensor:
        """Elements `start` to `start + count` of a parameter's part of some directions: new float32 (keys, count)."""
        ...


@dataclass(frozen=True)
class Independent:
    """Independent values of a distribution of `noise.py`, for each key and name."""

    distribution: str

    def ready(self, engine: Engine, names: Collection[str], keys: Sequence[Key], key: StepKey) -> "Independent":
        """See `Directions.ready`: nothing depends on the step."""
        return self

    def dimension(self, engine: Engine, names: Collection[str]) -> int:
        """See `Directions.dimension`: all of them."""
        return sum(whole_shape(engine.parameters[name]).numel() for name in names)

    def read(self, keys: Sequence[Key], name: str, start: int, count: int, device: torch.device) -> Tensor:
        """See `Directions.read`."""
        return DISTRIBUTIONS[self.distribution]([key.fold(name) for key in keys], start, count, device)
