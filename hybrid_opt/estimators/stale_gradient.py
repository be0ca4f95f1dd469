"""The latest gradient once more: the baseline of ES steps. Next: `followers.py`, which shows it the gradients.

One idea: a step that costs no forward pass is what a step of forward passes has to beat. Memory: float32, 4 bytes for each value
of this rank's shards of the parameters that both backprop and this estimator may move, on the shards' device.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.estimators.contract import Cost, Gradient
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Objective


@dataclass(frozen=True)
class KeptGradient:
    """A gradient that was copied from this rank's shards."""

    by_name: Mapping[str, tuple[int, Tensor]]
    """Index of its first value in the flattened parameter, and float32 (numel of the shard,)."""

    def read(self, shard: Shard) -> Tensor:
        """See `Estimate.read`; zeros where no gradient was kept."""
        if shard.name not in self.by_name:
            return torch.zeros_like(shard.data, dtype=torch.float32)
        start, kept = self.by_name[shard.name]
        return kept[shard.start - start :][: len(shard.data)]

    def add_to(self, out: Tensor, shard: Shard, factor: float) -> None:
        """See `Estimate.add_to`."""
        if shard.name in self.by_name:
            out.add_(self.read(shard), alpha=factor)


class StaleGradientEstimator:
    """`g_t = g_s`, s the latest step before t in which backprop took a gradient of the parameter; zero if there was none.

    g_s is the gradient before clipping, whatever weight and learning rate it had then. In a blend with backprop it is the
    gradient of the step before. A `FollowsBackprop`.
    """

    def __init__(self) -> None:
        self.latest: dict[str, tuple[int, Tensor]] = {}

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`: there is nothing that it could not do."""

    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[KeptGradient, Cost]:
        """See `Estimator.estimate`; nothing is evaluated."""
        # A mapping of its own: `follow` comes before this step's estimates are applied.
        return KeptGradient(dict(self.latest)), Cost(loss=None, forwards=0, backwards=0, forward_equivalents=0.0)

    @torch.no_grad()
    def follow(self, engine: Engine, gradient: Gradient, names: Collection[str]) -> None:
        """See `FollowsBackprop.follow`. The former copy of a shard is freed as the next is made, if no estimate holds it."""
        for shard in engine.shards(names):
            self.latest.pop(shard.name, None)
            self.latest[shard.name] = shard.start, gradient.read(shard).clone()  # it may be the gradient's own memory

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part of the gradient by parameter."""
        return {name: kept for name, (_, kept) in self.latest.items()}

    def load_state_dict(self, state: dict[str, Tensor], engine: Engine) -> None:
        """See `Remembers.load_state_dict`."""
        self.latest = {s.name: (s.start, state[s.name].to(s.data.device)) for s in engine.shards(state)}
