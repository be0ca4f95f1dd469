"""Inner products of estimates over the whole model, wherever its weights lie. Next: `../estimators/wrappers/norm_cap.py`.

One idea: estimates are read block by block, so that many of them can be compared while little of any is in memory, and each rank adds up
what lies on it.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.estimators.contract import Estimate
from hybrid_opt.noise.drawing import block_size


def inner_products(
    engine: Engine, names: Collection[str], rows: Sequence[Estimate], columns: Sequence[Estimate] = ()
) -> Tensor:
    """`<rows_i, columns_j>` over all values of the named parameters; all ranks together.

    Args:
        columns: other estimates; none: the rows themselves, which gives their Gram matrix.

    Returns:
        (rows, columns) float64 in main memory; each block is multiplied in float32 and added in float64.
    """
    total = torch.zeros(len(rows), len(columns or rows), dtype=torch.float64, device=engine.device)
    for block in blocks(engine, names):
        left = _stacked(rows, block)
        right = _stacked(columns, block) if columns else left
        total += (left @ right.T).double() / block.copies
    return engine.ranks.gather(total.cpu()).sum(dim=0)


def blocks(engine: Engine, names: Collection[str]) -> Iterator[Shard]:
    """This rank's shards in parts that fit a cache; of a matrix whole rows, which low rank noise is made of."""
    for shard in engine.shards(names):
        row = shard.shape[-1] if len(shard.shape) > 1 else 1
        size = max(1, block_size(shard.data.device) // row) * row
        first = size - shard.start % row if shard.start % row else size
        edges = [0, *range(min(first, len(shard.data)), len(shard.data), size), len(shard.data)]
        for start, stop in pairwise(edges):
            if stop > start:
                yield replace(shard, data=shard.data[start:stop], start=shard.start + start)


def _stacked(estimates: Sequence[Estimate], block: Shard) -> Tensor:
    out = torch.zeros(len(estimates), len(block.data), device=block.data.device)
    for row, estimate in zip(out, estimates, strict=True):
        estimate.add_to(row, block, 1.0)
    return out
