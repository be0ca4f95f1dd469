"""What a perturbation is: how a noise direction changes the weights. Next: `dense.py`, then `low_rank.py`.

One idea: a perturbation does two things with the same noise. `evaluate` finds the members' losses, `combine` adds up the
directions once their coefficients are known. In between there is nothing to keep but keys.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.estimators.noise import Key
from hybrid_opt.objectives.contract import Objective


@dataclass(frozen=True)
class Member:
    """One perturbed copy of the weights, `w + sign * sigma * noise(key)`."""

    key: Key
    """Key of its noise direction."""
    sign: int
    """+1 or -1; antithetic members share a key."""


class Perturbation(Protocol):
    """A form of noise, with its scale sigma."""

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """Raise UserError for a parameter whose noise cannot be evaluated."""
        ...

    def evaluate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], members: Sequence[Member]
    ) -> Tensor:
        """Losses of each member on each example of the batch: (members, examples), on the engine's device."""
        ...

    def combine(self, keys: Sequence[Key], coefficients: Tensor, shard: Shard) -> Tensor:
        """`sum_i coefficients_i * noise(key_i)` for a shard, without sigma: float32 (numel,)."""
        ...
