"""Two passes over weights that tell a lot for little: whether all are finite, and whether they are the same bits. Next: `zero_stages.py`.

One idea: a reduction reads each value once and writes none, so it costs what reading the memory costs; a closer look is for the few
tensors whose sum asks for it.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine

PLACES = 8191
"""Words in a row are multiplied by as many different numbers, so that exchanged values do not go unnoticed."""


def first_nonfinite(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that has an infinite value or NaN; None if there is none.

    The sum of a tensor with such a value is not finite. That of one without may overflow, so its values are looked at then.
    """
    weights = [(name, values) for name, values in weights if values.numel()]
    device = weights[0][1].device if weights else None
    # Fetched from the device once, not once a tensor.
    finite = torch.stack([v.sum().float().to(device) for _, v in weights]).isfinite().tolist() if weights else []
    suspects = (tensor for tensor, is_finite in zip(weights, finite, strict=True) if not is_finite)
    return next((name for name, values in suspects if not values.isfinite().all()), None)


def checksum(values: Tensor) -> Tensor:
    """A number for the bits of a tensor, () int64 on its device: `sum_i (2 (i mod PLACES) + 1) word_i` modulo 2^64, a word being 8 bytes.

    An odd factor can be divided by modulo 2^64, so a change of a single word never goes unnoticed. Nothing of the tensor's size is made.
    """
    raw = values.detach().contiguous().view(-1).view(torch.uint8)
    raw = raw.clone() if raw.storage_offset() % 8 else raw  # words begin at whole words of the memory
    whole = len(raw) // 8 * 8
    words, last = raw[:whole].view(torch.int64), raw.new_zeros(8)
    last[: len(raw) - whole] = raw[whole:]
    rest = torch.cat([words[len(words) // PLACES * PLACES :], last.view(torch.int64)])
    sums = torch.cat([words[: len(words) // PLACES * PLACES].view(-1, PLACES).sum(dim=0), rest.new_zeros(1)])
    sums[: len(rest)] += rest
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum()


def weights_digest(engine: Engine) -> str:
    """16 hexadecimal digits for the bits of all shards that this rank may write."""
    sums = [(shard.name, shard.start, int(checksum(shard.data))) for shard in engine.shards(engine.parameters)]
    return hashlib.blake2b(repr(sums).encode(), digest_size=8).hexdigest()
