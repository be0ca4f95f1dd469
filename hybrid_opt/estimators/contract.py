"""What an estimator is and what it gives back. Next: `../noise/keys.py`, `../perturbations/contract.py`, then `probing.py`,
`backprop.py` and `stale_gradient.py`.

One idea: everything that wants to move the weights is an Estimate that can be read shard by shard. A weighted sum of
Estimates is an Estimate, and this is all that blending, alternating and per-layer choice need.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Objective


class Estimate(Protocol):
    """A gradient estimate for the parameters that its estimator may move."""

    def read(self, shard: Shard) -> Tensor:
        """The part of the estimate that belongs to a shard: float32 (numel of the shard,), in gradient units."""
        ...

    def add_to(self, out: Tensor, shard: Shard, factor: float) -> None:
        """`out += factor * read(shard)` in place, out: float32 (numel of the shard,); it may need less memory."""
        ...


class Gradient(Estimate, Protocol):
    """The gradient of a backward pass, which is there until it has been applied."""

    def whole(self, name: str) -> Tensor | None:
        """All of a parameter's gradient on every rank: flat float32, not to be written; None if the loss does not depend on it.
        All ranks together."""
        ...


@dataclass(frozen=True)
class Cost:
    """What an estimate took and saw."""

    loss: float | None
    """Mean loss of the step's examples; for ES over all members; None if nothing was evaluated."""
    forwards: int
    """Forward passes: for ES one a member, over the examples that it sees."""
    backwards: int
    """Backward passes."""
    forward_equivalents: float
    """Computing in forward passes over the whole batch: an ES member counts for the share of the batch that it sees, a backward
    pass for 2, and for 3 where it recomputes activations (gradient checkpointing)."""
    tokens: int = 0
    """Tokens that the forward passes processed, padding left out."""
    loss_spread: float | None = None
    """Standard deviation of the members' losses (ES)."""
    statistics: Mapping[str, float] = field(default_factory=dict)
    """How good the estimate may be: `snr`, `gradient_norm` (antithetic ES), `cosine` and `rho2` (where backprop acted too); with a
    reward also what was written, how many pairs were tied, ...; `nonfinite_members` where losses were not finite"""
    is_empty: bool = False
    """Whether all members were equally good, or too many losses not finite, so that the estimate says nothing and is not applied."""

    @property
    def nonfinite_members(self) -> int:
        """Members whose loss was not finite."""
        return int(self.statistics.get("nonfinite_members", 0))


class Estimator(Protocol):
    """Finds a descent direction at the current weights; never steps, and leaves the weights bitwise as they were."""

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """Raise UserError if it cannot estimate the gradient for these parameters of this model."""
        ...

    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[Estimate, Cost]:
        """Estimate the gradient of the objective's mean loss over `batch` with respect to the parameters `names`."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """An estimator whose next estimate depends on earlier steps, so that checkpoints hold what it remembers."""

    def state_dict(self) -> dict[str, Any]:
        """What this rank remembers, as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any], engine: Engine) -> None:
        """Put back what `state_dict` gave; the state may hold other ranks' entries too, and its tensors lie in main memory."""
        ...


@runtime_checkable
class FollowsBackprop(Protocol):
    """An estimator that is also shown every gradient that backprop takes."""

    def follow(self, engine: Engine, gradient: Gradient, names: Collection[str]) -> None:
        """See the gradient of a step, before it is applied: it can be read only now, and is finite.

        Estimates of the same step were made before and are read after, so what they hold must not change.

        Args:
            names: parameters that the gradient is of and that this estimator may ever move.
        """
        ...


@runtime_checkable
class Prepares(Protocol):
    """A part of an estimator that decides something from the weights before anything is evaluated."""

    def prepare(self, engine: Engine, names: Collection[str], key: StepKey) -> Collection[str]:
        """Decide it for a step, and give the parameters that the part within is to look at; all ranks together."""
        ...


def prepared(estimator: Estimator, engine: Engine, names: Collection[str], key: StepKey) -> None:
    """Let an estimator, from the outside in, decide what it would decide in its estimate of the same step at the same weights."""
    for part in chain(estimator):
        if isinstance(part, Prepares):
            names = part.prepare(engine, names, key)


def chain(estimator: Estimator) -> Iterator[Any]:
    """An estimator and what it wraps (`inner`), from the outside in."""
    part = estimator
    while part is not None:
        yield part
        part = getattr(part, "inner", None)


def innermost(estimator: Estimator) -> Any:
    """The estimator that evaluates something, without what is around it."""
    *_, part = chain(estimator)
    return part


@dataclass(frozen=True)
class WeightedSum:
    """`sum_j weight_j * estimate_j`."""

    terms: Sequence[tuple[float, Estimate]]

    def read(self, shard: Shard) -> Tensor:
        """The sum for a shard: float32 (numel,)."""
        return zeros_and(self, shard)

    def add_to(self, out: Tensor, shard: Shard, factor: float) -> None:
        """Adds the terms one after the other, so no more than one is in memory at a time."""
        for weight, estimate in self.terms:
            estimate.add_to(out, shard, factor * weight)


@dataclass(frozen=True)
class Restricted:
    """An estimate for some parameters, zero for all others."""

    estimate: Estimate
    names: frozenset[str]

    def read(self, shard: Shard) -> Tensor:
        """See `Estimate.read`."""
        return zeros_and(self, shard)

    def add_to(self, out: Tensor, shard: Shard, factor: float) -> None:
        """See `Estimate.add_to`."""
        if shard.name in self.names:
            self.estimate.add_to(out, shard, factor)


def zeros_and(estimate: Estimate, shard: Shard) -> Tensor:
    """`read` for an estimate that is made by `add_to`."""
    out = torch.zeros(shard.data.shape, device=shard.data.device)
    estimate.add_to(out, shard, 1.0)
    return out
