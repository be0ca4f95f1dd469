"""What an engine is: the place where the weights really live. Next: `update_rules.py`.

One idea: estimators and update rules see weights only as Shards, flat slices of single parameters, so they need not know
how the weights are spread over devices and processes.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hybrid_opt.engines.update_rules import UpdateRule
    from hybrid_opt.estimators.contract import Estimate


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

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Every parameter that may ever move, by name; tied parameters count once."""
        ...

    def shards(self, names: Collection[str]) -> Iterator[Shard]:
        """This process's shards of the named parameters."""
        ...

    def apply(self, contributions: Sequence[Contribution], step: int) -> None:
        """Apply all contributions of a step, counted from 0, together.

        A parameter that a contribution without a rule may move goes through the optimizer, with every other
        contribution to it added to its gradient; any other is moved directly by each contribution's own rule.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state, as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        ...
