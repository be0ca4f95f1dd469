"""A pull back to the weights at the start. Next: `../training/hybrid_optimizer.py`.

One idea: the penalty `strength / 2 |w - w_start|^2` has an exact gradient that needs no data, so it is an Estimate like any other and
is added to that of whoever asked for it (L2-SP, arXiv 1802.01483).
"""

from collections.abc import Collection

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.estimators.contract import zeros_and


class Anchor:
    """`w - w_start`, read from the shards themselves; keeps a copy of the first weights, 4 bytes each, in main memory.

    Args:
        engine: holds the weights, which are the first ones now.
        names: parameters that are ever pulled.
    """

    def __init__(self, engine: Engine, names: Collection[str]) -> None:
        self.start = {
            shard.name: torch.empty(shard.data.shape, dtype=torch.float32).copy_(shard.data)
            for shard in engine.shards(names)
        }

    def read(self, shard: Shard) -> Tensor:
        """See `Estimate.read`."""
        return zeros_and(self, shard)

    def add_to(self, out: Tensor, shard: Shard, factor: float) -> None:
        """See `Estimate.add_to`; `out` may be the weights themselves."""
        out.add_(shard.data.float() - self.start[shard.name].to(out.device), alpha=factor)
