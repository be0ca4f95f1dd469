"""The noise of `noise.py` by torch operations, for GPUs. Next: `../perturbations/contract.py`.

One idea: only operations that IEEE 754 defines exactly are used (integer arithmetic, +, *, sqrt; no library function),
one at a time, so the values are those of `numba_kernels.py`, bitwise.
"""

import torch
from torch import Tensor

from hybrid_opt.noise.constants import (
    ANGLE,
    BOUNDARY,
    COS,
    LN2_HIGH,
    LN2_LOW,
    LOG,
    MIXER,
    PER_WORD,
    SIN,
    UNIFORM,
)

BLOCK = 1 << 24
"""Values computed at a time: enough to fill a GPU, few enough for its memory."""


def fill(distribution: str, keys: Tensor, start: int, out: Tensor) -> None:
    """See `numba_kernels.fill`; any device."""
    block, per_word = _BLOCKS[distribution], PER_WORD[distribution]
    key_words = keys.to(out.device).split(1, dim=1)
    piece = max(per_word, BLOCK // len(keys) // per_word * per_word)
    at, stop = start, start + out.shape[1]
    while at < stop:
        aligned = at // per_word * per_word
        end = min(stop, aligned + piece)
        words = torch.arange(aligned // per_word, -(-end // per_word), dtype=torch.int32, device=out.device)
        values = block(words, *key_words)
        out[:, at - start : end - start] = values[:, at - aligned : end - aligned]
        at = end


def _gaussian(words: Tensor, k0: Tensor, k1: Tensor, k2: Tensor, k3: Tensor) -> Tensor:
    u, v = _hash(words, k0, k1), _hash(words, k2, k3)
    radius = _exact_sqrt(_log_uniform(u).mul_(-2.0))
    cosine, sine = _unit_circle(v)
    return torch.stack((cosine.mul_(radius), sine.mul_(radius)), dim=-1).flatten(1)


def _rademacher(words: Tensor, k0: Tensor, k1: Tensor, k2: Tensor, k3: Tensor) -> Tensor:
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    ones = (_hash(words, k0, k1).unsqueeze(-1) >> bits).bitwise_and_(1)
    return ones.mul_(2).sub_(1).flatten(1).float()


def _bits(words: Tensor, k0: Tensor, k1: Tensor, k2: Tensor, k3: Tensor) -> Tensor:
    drawn = _hash(words, k0, k1)
    return torch.stack((drawn & 0xFFFF, _shift(drawn, 16)), dim=-1).flatten(1).float()


_BLOCKS = {"gaussian": _gaussian, "rademacher": _rademacher, "bits": _bits}


def _hash(words: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """See `noise.py`; int32, whose products wrap around."""
    x = _round_of_mixing(words ^ k0)
    x += k1
    return _round_of_mixing(x)


def _round_of_mixing(x: Tensor) -> Tensor:
    x ^= _shift(x, 16)
    x *= MIXER[0]
    x ^= _shift(x, 15)
    x *= MIXER[1] - (1 << 32)
    x ^= _shift(x, 16)
    return x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right (torch's own keeps the sign)."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _log_uniform(bits: Tensor) -> Tensor:
    """Natural logarithm of a uniform value in (0, 1) made from 32 random bits, float32.

    u = m 2^e with m in [sqrt(1/2), sqrt(2)); ln u = e ln 2 + ln m.
    """
    u = ((bits >> 1).bitwise_and_(0x7FFFFFFF).float() + 0.5) * UNIFORM
    raw = u.view(torch.int32)
    # Adding the distance from sqrt(1/2) to 1 carries into the exponent exactly when the mantissa is above sqrt(1/2).
    shifted = raw + (0x3F800000 - BOUNDARY)
    exponent = (shifted >> 23).sub_(127).float()
    x = (shifted.bitwise_and_(0x007FFFFF) + BOUNDARY).view(torch.float32) - 1.0
    polynomial = _horner(x, LOG)
    square = x * x
    # The logarithm of a value just below 1 may round to a tiny positive number; -2 ln u must not be negative.
    return (polynomial * square * x + exponent * LN2_LOW - square * 0.5 + x + exponent * LN2_HIGH).clamp_(max=0.0)


def _exact_sqrt(x: Tensor) -> Tensor:
    """The nearest float32. On a CPU torch's own is off by one unit in the last place for every seventh value."""
    return x.sqrt_() if x.is_cuda else x.double().sqrt_().float()


def _unit_circle(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of a uniform angle made from 32 random bits, float32 each.

    The upper two bits choose a quadrant; the others an angle in (-pi/4, pi/4).
    """
    x = ((bits & 0x3FFFFFFF).sub_(0x20000000).float() + 0.5) * ANGLE
    square = x * x
    sine = _horner(square, SIN) * square * x + x
    cosine = _horner(square, COS) * square * square - square * 0.5 + 1.0
    quadrant = bits >> 30  # -2, -1, 0, 1
    odd = (quadrant & 1).bool()
    sign = (quadrant | 1).float()  # the half turn: -1 for -2 and -1, +1 for 0 and 1
    first, second = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    return first.mul_(sign), second.mul_(sign)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result.mul_(x).add_(coefficient)
    return result
