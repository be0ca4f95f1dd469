"""Numbers that tell whether weights are bitwise what they were. Next: `../recovery/keeping.py`.

One idea: the bits of floats are integers, whose sums are exact in any order, so a checksum costs one reading and no copy.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hybrid_opt.engines.contract import Engine, whole_shape
from hybrid_opt.noise.drawing import block_size

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MULTIPLIER = 6364136223846793005
"""An odd number with good mixing, of Knuth's linear congruential generator."""


@torch.no_grad()
def checksum(values: Tensor) -> Tensor:
    """A number for the bits and the order of a tensor's elements, int64 on its device: `sum_i (2i + 1) bits_i` of a block,
    `MULTIPLIER * sum + block` from one to the next, modulo 2^64.

    An odd factor has an inverse modulo 2^64, so a change of one element always changes the number.
    """
    bits = values.detach().contiguous().view(-1).view(BITS[values.element_size()])
    block = block_size(bits.device)
    odd = torch.arange(1, 2 * min(block, len(bits)) + 1, 2, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in bits.split(block):
        total = total * MULTIPLIER + (piece.long() * odd[: len(piece)]).sum()
    return total


def checksums(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The checksum of each parameter that is whole here, (parameters,) int64; 0 for one that is not."""
    zero = torch.zeros((), dtype=torch.int64)
    return torch.stack([checksum(p.data).cpu() if p.shape == whole_shape(p) else zero for p in parameters])


def weights_digest(engine: Engine) -> str:
    """16 hexadecimal digits for all shards that this rank may write."""
    sums = [(shard.name, shard.start, int(checksum(shard.data))) for shard in engine.shards(engine.parameters)]
    return hashlib.blake2b(repr(sums).encode(), digest_size=8).hexdigest()
