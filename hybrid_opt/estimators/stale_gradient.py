"""The latest gradient once more: a baseline without forward passes. Next: `comparison.py`.

One idea: if steps of ES do no better than repeating the last gradient, their forward passes are wasted.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.config.estimators import StaleGradient
from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.estimators.contract import Cost, zeros_and
from hybrid_opt.estimators.noise import Key
from hybrid_opt.objectives.contract import Objective


@dataclass(frozen=True)
class KeptGradient:
    """Slices of a gradient that is gone."""

    by_name: dict[str, Tensor]
    """For each parameter this process's slice: float32 (numel,)."""

    def read(self, shard: Shard) -> Tensor:
        """See `Estimate.read`."""
        return zeros_and(self, shard)

    def add_to(self, out: Tensor, shard: Shard, factor: float) -> None:
        """See `Estimate.add_to`; nothing is added where there was no gradient."""
        if (gradient := self.by_name.get(shard.name)) is not None:
            out.add_(gradient.to(out.device), alpha=factor)  # a loaded one lies in main memory


class StaleGradientEstimator:
    """`g = d/dw mean(losses)` of the latest step in which backprop acted, at the weights of that step; zero before there was one.

    It keeps a float32 copy of this process's part of that gradient: 4 bytes a value.
    """

    def __init__(self, config: StaleGradient):
        self.config = config
        self.kept: dict[str, Tensor] = {}

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`; any parameter will do."""

    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: Key
    ) -> tuple[KeptGradient, Cost]:
        """See `Estimator.estimate`."""
        return KeptGradient(self.kept), Cost(loss=None, forwards=0, backwards=0, forward_equivalents=0.0)

    @torch.no_grad()
    def follow(self, engine: Engine, gradient: Any, names: Collection[str]) -> None:
        """See `FollowsBackprop.follow`. What was kept before stays with the estimate of this step, if there is one."""
        self.kept = {shard.name: gradient.read(shard).clone() for shard in engine.shards(names)}

    def state_dict(self) -> dict[str, Tensor]:
        """The gradient by parameter."""
        return dict(self.kept)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        self.kept = dict(state)
