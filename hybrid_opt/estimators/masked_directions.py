"""Directions that leave some values alone. Next: `dense.py`.

One idea: a mask sits right around the source of independent values, so whatever makes directions of these mixes masked ones and sees
their inner products.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine
from hybrid_opt.estimators.directions import Directions
from hybrid_opt.estimators.masks import size_of, unpacked
from hybrid_opt.estimators.noise import Key, StepKey


@dataclass(frozen=True)
class Masked:
    """`M z`: another source's directions with 0 wherever a parameter's mask has 0.

    Args:
        inner: where z comes from.
        masks: whole packed masks by parameter, of every parameter that is read; the source for a step takes those of the moment.
    """

    inner: Directions
    masks: Mapping[str, Tensor]

    def ready(self, engine: Engine, names: Collection[str], keys: Sequence[Key], key: StepKey) -> "Masked":
        """See `Directions.ready`."""
        return Masked(self.inner.ready(engine, names, keys, key), {name: self.masks[name] for name in names})

    def dimension(self, engine: Engine, names: Collection[str]) -> int:
        """How many of these parameters' values are in the masks, on all ranks together."""
        return sum(size_of(self.masks[name]) for name in names)

    def read(self, keys: Sequence[Key], name: str, start: int, count: int, device: torch.device) -> Tensor:
        """See `Directions.read`."""
        drawn = self.inner.read(keys, name, start, count, device)
        return drawn.mul_(unpacked(self.masks[name], start, count).to(device))


def around_innermost(directions: Directions, change: Callable[[Directions], Directions]) -> Directions:
    """The same directions, made of what `change` makes of their innermost source."""
    inner = getattr(directions, "inner", None)
    return change(directions) if inner is None else replace(directions, inner=around_innermost(inner, change))
