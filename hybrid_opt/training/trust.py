"""Trust: how far an estimator may move the weights, measured by how far backprop last did. Next: `hybrid_optimizer.py`.

One idea: gradients are exact and their steps are tuned, so the length of the latest one is a scale for updates that are mostly noise.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Contribution, Engine


class Trust:
    """Measures backprop's updates, and what others are about to do; all ranks call its methods together and are told the same.

    Args:
        engine: holds the weights.
        is_asked: whether anybody is limited; if not, nothing is measured.
    """

    def __init__(self, engine: Engine, is_asked: bool) -> None:
        self.engine, self.is_asked = engine, is_asked
        self.latest: float | None = None
        """Euclidean norm of the change that backprop's latest step has made; None before the first."""

    @contextmanager
    def measured(self, names: Collection[str]) -> Iterator[None]:
        """Inside, an update is made in which backprop moves the named parameters (none: it does not act).

        Keeps a float32 copy of them in main memory meanwhile. A step that moves nothing, such as one that loss scaling skips, is none.
        """
        names = names if self.is_asked else ()
        before = {
            shard.name: torch.empty(shard.data.shape, dtype=torch.float32).copy_(shard.data)
            for shard in self.engine.shards(names)
        }
        yield
        if names:
            shards = self.engine.shards(names)
            moved = self._norm((s.data.float() - before.pop(s.name).to(s.data.device), s.copies) for s in shards)
            self.latest = moved if moved > 0 else self.latest

    def factor(self, trust: float, own: Contribution) -> float:
        """What to multiply the learning rate of a contribution with a rule by, `min(1, trust |backprop's latest change| / |its change|)`.

        1 before backprop has moved anything. The change is that of float32 weights, before any rounding to narrower ones.
        """
        if self.latest is None:
            return 1.0
        norm = own.learning_rate * self._norm(self._directions(own))
        return trust * self.latest / norm if norm > trust * self.latest else 1.0

    def _directions(self, own: Contribution) -> Iterator[tuple[Tensor, int]]:
        for shard in self.engine.shards(own.names):
            wide = replace(shard, data=shard.data.float())
            yield own.rule.direction(wide, own.estimate, own.weight), shard.copies

    def _norm(self, parts: Iterable[tuple[Tensor, int]]) -> float:
        """Of a vector over the whole model, given this rank's parts of it, and on how many ranks each part lies."""
        device = self.engine.device  # parts may lie elsewhere too, where DeepSpeed offloads masters
        squares = [part.square().sum().double().to(device) / copies for part, copies in parts]
        own = torch.stack(squares).sum().item() if squares else 0.0
        return self.engine.ranks.total(own) ** 0.5
