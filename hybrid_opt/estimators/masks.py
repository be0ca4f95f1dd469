"""Which of a parameter's values belong to a mask, alike on every rank. Next: `masked_directions.py`.

One idea: ranks count how many of their values lie in each of 256 intervals, four times, each interval cut finer than the one before;
that finds the value at the mask's border exactly, and what ranks exchange does not grow with the model until the masks' bits are joined.
"""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine, Shard, whole_shape
from hybrid_opt.estimators.noise import Key, block_size, gaussian

Sizes = Callable[[Shard], Tensor]
"""Sizes of a shard's values: float32 (numel,), none negative."""
BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def smallest(engine: Engine, names: Collection[str], sizes: Sizes, keep: float) -> dict[str, Tensor]:
    """Packed masks of the share `keep` of each parameter's values whose sizes are the smallest; all ranks together."""
    borders = _borders(engine, sizes, {name: _share(keep, _count(engine, name)) for name in names})
    return _joined(engine, borders, lambda shard: sizes(shard) <= borders[shard.name])


def largest(engine: Engine, names: Collection[str], sizes: Sizes, keep: float) -> dict[str, Tensor]:
    """Packed masks of the share `keep` of each parameter's values whose sizes are the largest, without 0; all ranks together."""
    counts = {name: _count(engine, name) for name in names}
    borders = _borders(engine, sizes, {name: count - _share(keep, count) + 1 for name, count in counts.items()})
    return _joined(engine, borders, lambda shard: (sizes(shard) >= borders[shard.name]) & (sizes(shard) > 0))


def random(engine: Engine, names: Collection[str], key: Key, keep: float) -> dict[str, Tensor]:
    """Packed masks with each value in them with probability `keep`, a function of key, name and index alone."""
    border = torch.special.ndtri(torch.tensor(keep, dtype=torch.float64)).item()  # P(z < border) = keep
    return {name: _drawn(key.fold(name), _count(engine, name), border, engine.device) for name in names}


def packed(mask: Tensor) -> Tensor:
    """A mask (n,) of truth values as (ceil(n/8),) uint8, eight in a byte."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    return (padded * padded.new_tensor(BITS)).sum(dim=1, dtype=torch.uint8)


def unpacked(bits: Tensor, start: int, count: int) -> Tensor:
    """Values `start` to `start + count` of a packed mask: (count,) of truth values."""
    first = start // 8
    some = bits[first : -(-(start + count) // 8), None]
    return (some & some.new_tensor(BITS)).ne(0).view(-1)[start - 8 * first :][:count]


def size_of(bits: Tensor) -> int:
    """How many values are in a packed mask."""
    return int(sum(unpacked(part, 0, 8 * len(part)).sum() for part in bits.split(block_size(bits.device))))


def _borders(engine: Engine, sizes: Sizes, places: Mapping[str, int]) -> dict[str, float]:
    """The k-th smallest size of each parameter, k from 1; all ranks together.

    The bits of floats that are not negative, read as integers, are in the floats' order.
    """
    numbers = {name: i for i, name in enumerate(places)}
    found = torch.zeros(len(places), dtype=torch.int64)
    left = torch.tensor(list(places.values()), dtype=torch.int64)
    for shift in (24, 16, 8, 0):
        counts = torch.zeros(len(places), 256, dtype=torch.float64, device=engine.device)
        for shard in engine.shards(places):
            number = numbers[shard.name]
            bits = sizes(shard).view(torch.int32)
            inside = bits[(bits >> shift) >> 8 == int(found[number])]
            counts[number] += torch.bincount((inside >> shift) & 255, minlength=256) / shard.copies
        below = engine.ranks.gather(counts.cpu()).sum(dim=0).round().long().cumsum(dim=1)
        byte = (below < left[:, None]).sum(dim=1)
        left -= torch.where(byte > 0, below.gather(1, (byte - 1).clamp(min=0)[:, None])[:, 0], 0)
        found = (found << 8) + byte
    return dict(zip(places, found.to(torch.int32).view(torch.float32).tolist(), strict=True))


def _joined(engine: Engine, names: Collection[str], chosen: Callable[[Shard], Tensor]) -> dict[str, Tensor]:
    """Whole packed masks of what each rank has chosen of its shards; all ranks together."""
    masks, mine = {}, {shard.name: shard for shard in engine.shards(names)}
    for name in names:
        whole = torch.zeros(_count(engine, name), dtype=torch.bool, device=engine.device)
        if name in mine:
            shard = mine[name]
            whole[shard.start : shard.start + len(shard.data)] = chosen(shard)
        masks[name] = packed(whole)
        for other in engine.ranks.gather(masks[name]) if engine.ranks.world_size > 1 else ():
            masks[name] |= other
    return masks


def _drawn(key: Key, count: int, border: float, device: torch.device) -> Tensor:
    block = block_size(device)  # a multiple of 8
    parts = [packed(gaussian([key], at, min(block, count - at), device)[0] < border) for at in range(0, count, block)]
    return torch.cat(parts)


def _share(keep: float, count: int) -> int:
    return max(1, round(keep * count))


def _count(engine: Engine, name: str) -> int:
    return whole_shape(engine.parameters[name]).numel()
