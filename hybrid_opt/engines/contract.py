"""What an engine is: the place where the weights really live. Next: `update_rules.py`.

One idea: estimators and update rules see weights only as Shards, flat slices of single parameters, so they need not know
how the weights are spread over devices and processes.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hybrid_opt.engines.ranks import Ranks
    from hybrid_opt.engines.update_rules import Treatment, UpdateRule
    from hybrid_opt.estimators.contract import Estimate, Gradient


@dataclass(frozen=True)
class Shard:
    """The flat slice of one parameter that this process may write."""

    name: str
    """Name of the parameter."""
    data: Tensor
    """The weights that updates are added to: 1-D, float32; narrower only while nothing is being updated, in an engine that
    keeps no master weights."""
    start: int
    """Index of `data[0]` in the flattened parameter."""
    shape: torch.Size
    """Shape of the whole parameter."""
    copies: int = 1
    """How many ranks hold this very slice, so that the sum over all ranks' shards of `f(shard) / copies` is one over the model."""


@dataclass(frozen=True)
class Contribution:
    """One estimator's part in a step."""

    estimate: "Estimate"
    weight: float
    """Factor of the estimate, from the schedule."""
    names: Collection[str]
    """Parameters that the estimator may move."""
    learning_rate: float
    rule: "UpdateRule | None"
    """How to turn the estimate into a change of the weights; None: by the engine's optimizer."""


class Engine(Protocol):
    """Holds the model, evaluates it and applies steps to it."""

    model: nn.Module
    device: torch.device
    ranks: "Ranks"
    independent_forwards: bool
    """Whether this process can run the model without the others, so that it may make more or fewer forward passes than they."""
    memory_limit: int | None
    """Bytes that forward passes must keep the process's memory (on CUDA: what torch allocates) below; None: as much as there is."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Every parameter that may ever move, by name; tied parameters count once."""
        ...

    def shards(self, names: Collection[str]) -> Iterator[Shard]:
        """This process's shards of the named parameters."""
        ...

    def gradients(self, losses: Sequence[Callable[[], Tensor]], names: Collection[str]) -> tuple["Gradient", float]:
        """The gradient of a sum of losses with respect to the named parameters, and the sum.

        Args:
            losses: each computes a part of the sum, a scalar, whose backward pass is made before the next is computed. Ranks
                have different parts, but equally many; the sum is over all of them.
        """
        ...

    def first_moment(self, name: str) -> Tensor | None:
        """The optimizer's running mean or sum of a parameter's gradients, whole on every rank: flat float32, not to be written; None
        where it has none. All ranks together."""
        ...

    def apply(self, contributions: Sequence[Contribution], step: int) -> None:
        """Apply all contributions of a step, counted from 0, together.

        A parameter that a contribution without a rule may move goes through the optimizer, with every other
        contribution to it added to its gradient; any other is moved directly by each contribution's own rule.
        """
        ...

    def after_rest(self, treatment: "Treatment", steps: int) -> None:
        """Steps were taken without the optimizer: `decay` its state as if the gradients in them had been 0, or `reset` it."""
        ...

    def is_finite(self) -> bool:
        """Whether no weight that may move is infinite or NaN, on any rank."""
        ...

    def forward_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What forward passes compute with, as far as this rank keeps it: names and values of all the model's parameters, frozen ones
        too, always in the same order."""
        ...

    def whole_weights(self) -> dict[str, Tensor] | None:
        """On rank 0 the model's state dict with every parameter whole; None on other ranks."""
        ...

    def layout(self) -> dict[str, int]:
        """How the state is spread: a checkpoint can only be loaded under the same `ranks` and `zero_stage` (0: none)."""
        ...

    def state_dict(self, folder: Path | None = None) -> dict[str, Any]:
        """This rank's weights and optimizer state, as tensors and plain values. What all ranks have in common may be in rank
        0's alone.

        Args:
            folder: a new folder, for what only the engine's library can save; LocalEngine needs none.
        """
        ...

    def load_state_dict(self, state: dict[str, Any], folder: Path | None = None) -> None:
        """Put back what `state_dict` gave and wrote."""
        ...

    def leave(self) -> None:
        """The run is over: wait for the other ranks, and exchange nothing any more."""
        ...


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of a parameter, also of one that ZeRO-3 has left empty here because its parts lie in several processes."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_spread(parameter: Tensor) -> bool:
    """Whether ZeRO-3 keeps the parameter's parts in several processes."""
    return hasattr(parameter, "ds_shape")
