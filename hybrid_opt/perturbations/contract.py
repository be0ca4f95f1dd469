"""What a perturbation is: how a noise direction changes the weights. Next: `rehearsal.py`, then `dense.py`, `low_rank.py`.

One idea: a perturbation does two things with the same noise. `evaluate` finds the members' losses, `add_noise` adds up the
directions once their coefficients are known. In between there is nothing that must be kept but keys.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.noise.keys import Key, StepKey
from hybrid_opt.objectives.contract import Objective


@dataclass(frozen=True)
class Member:
    """One perturbed copy of the weights, `w + sign * sigma * noise(key)`."""

    key: Key
    """Key of its noise direction."""
    sign: int
    """+1 or -1, antithetic members share a key; 0: the weights as they are."""


class Perturbation(Protocol):
    """A form of noise, with its scale sigma."""

    scales: Mapping[str, float]
    """For some parameters a factor s of sigma, else 1: `evaluate` multiplies noise by it and `add_noise` divides by it, so that
    estimates keep the gradient's units, `1/(N sigma s) sum w eps`."""

    exceptions: Mapping[str, str]
    """What evaluations have shown of parameters that `add_noise` treats otherwise than the rest: how, by name. To be given to a
    perturbation that has not evaluated anything."""

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """Raise UserError for a parameter whose noise cannot be evaluated."""
        ...

    def ready(self, engine: Engine, names: Collection[str], keys: Sequence[Key], key: StepKey) -> "Perturbation":
        """The perturbation for one step, once it is known which parameters it perturbs along which directions; all ranks together."""
        ...

    def dimension(self, engine: Engine, names: Collection[str]) -> int:
        """How many values of these parameters, on all ranks together, directions move."""
        ...

    def evaluate(
        self,
        engine: Engine,
        objective: Objective,
        batch: Any,
        names: Collection[str],
        members: Sequence[Member],
        examples: Tensor | None,
    ) -> Tensor:
        """Losses of each member: (members, examples of each) float32, on the engine's device.

        Args:
            examples: numbers of the batch's examples that each member sees, (members, k) int64; None: a batch without
                tensors, which every member sees whole.
        """
        ...

    def add_noise(self, keys: Sequence[Key], coefficients: Tensor, shard: Shard, out: Tensor) -> None:
        """`out += sum_i coefficients_i * noise(key_i)` for a shard, without sigma; out: float32 (numel of the shard,)."""
        ...
