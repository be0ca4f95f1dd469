"""Noise as a pure function of a key and an element's index.

One idea: nothing is ever drawn from a generator with a state. The value of element i is computed from i, so any slice
of a tensor's noise is the slice of the whole, bitwise, whatever the device, thread count or sharding. To that end only
operations that IEEE 754 defines exactly are used (integer arithmetic, +, *, sqrt; no libm). Next: `shaping.py`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = (
    1 << 18
)  # Elements computed at a time: few enough to stay in cache, enough for each operation to be worth its call.
INDEX_BITS = 31  # An index's higher bits enter through the key, so tensors may have more than 2^31 elements.


@dataclass(frozen=True)
class Key:
    """The origin of a stream of noise: a seed and everything folded into it, such as step, member and name.

    Two keys with different parts give independent streams; equal keys give equal ones.
    """

    parts: tuple[int | str, ...]

    def fold(self, *parts: int | str) -> "Key":
        """A new key that also depends on `parts`."""
        return Key((*self.parts, *parts))

    def seed(self) -> int:
        """A non-negative integer of 63 bits, for libraries that want a seed."""
        return int.from_bytes(hashlib.blake2b(repr(self.parts).encode(), digest_size=8).digest(), "little") >> 1


def block_size(device: torch.device) -> int:
    """Elements to compute at a time: few enough for a processor's cache, or enough to fill a GPU."""
    return 1 << 18 if device.type == "cpu" else 1 << 24


Distribution = Callable[[Sequence[Key], int, int, torch.device], Tensor]


def gaussian(keys: Sequence[Key], start: int, count: int, device: torch.device) -> Tensor:
    """Elements `start` to `start + count` of the standard normal noise of each key, float32 (keys, count).

    Box-Muller: with u, v uniform in (0, 1), `sqrt(-2 ln u) cos(2 pi v)` and `sqrt(-2 ln u) sin(2 pi v)` are independent
    standard normal values; they become elements 2j and 2j + 1.
    """
    return _in_blocks(_gaussian_block, 2, keys, start, count, device)


def rademacher(keys: Sequence[Key], start: int, count: int, device: torch.device) -> Tensor:
    """Elements `start` to `start + count` of each key's -1 / +1 noise, float32 (keys, count); 32 from each random word."""
    return _in_blocks(_rademacher_block, 32, keys, start, count, device)


DISTRIBUTIONS: dict[str, Distribution] = {"gaussian": gaussian, "rademacher": rademacher}


def _in_blocks(block, per_word: int, keys: Sequence[Key], start: int, count: int, device: torch.device) -> Tensor:
    """Computes `block` over the aligned range of words that covers the slice, a cache-sized piece at a time."""
    out = torch.empty(len(keys), count, device=device, dtype=torch.float32)
    piece = max(per_word, block_size(device) // max(1, len(keys)) // per_word * per_word)
    stop, at, high, key_words = start + count, start, -1, ()
    while at < stop:
        aligned = at // per_word * per_word
        if aligned >> INDEX_BITS != high:
            high = aligned >> INDEX_BITS
            key_words = _key_words(keys, high, device)
        end = min(stop, aligned + piece, (high + 1) << INDEX_BITS)
        words = _words(aligned // per_word, -(-end // per_word), high, per_word, device)
        values = block(words, *key_words)
        out[:, at - start : end - start] = values[:, at - aligned : end - aligned]
        at = end
    return out


def _words(first: int, stop: int, high: int, per_word: int, device: torch.device) -> Tensor:
    base = (high << INDEX_BITS) // per_word  # counted from the start of this key block, so that it fits in 31 bits
    return torch.arange(first - base, stop - base, dtype=torch.int32, device=device)


def _key_words(keys: Sequence[Key], high: int, device: torch.device) -> tuple[Tensor, ...]:
    """Four 32-bit words a key, each (keys, 1) int32."""
    digests = b"".join(hashlib.blake2b(repr((*key.parts, high)).encode(), digest_size=16).digest() for key in keys)
    words = torch.frombuffer(bytearray(digests), dtype=torch.int32).view(len(keys), 4).to(device)
    return words.split(1, dim=1)


def _gaussian_block(words: Tensor, k0: Tensor, k1: Tensor, k2: Tensor, k3: Tensor) -> Tensor:
    u, v = _hash(words, k0, k1), _hash(words, k2, k3)
    radius = _log_uniform(u).mul_(-2.0).sqrt_()
    cosine, sine = _unit_circle(v)
    return torch.stack((cosine.mul_(radius), sine.mul_(radius)), dim=-1).flatten(1)


def _rademacher_block(words: Tensor, k0: Tensor, k1: Tensor, k2: Tensor, k3: Tensor) -> Tensor:
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    ones = (_hash(words, k0, k1).unsqueeze(-1) >> bits).bitwise_and_(1)
    return ones.mul_(2).sub_(1).flatten(1).float()


def _hash(words: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """32 random bits (int32) for each index and key: the `lowbias32` mixer twice, with a key word before each.

    The second key word keeps two streams from being shifted or permuted copies of each other. Source of the mixer and
    its constants: C. Wellons, "Prospecting for Hash Functions" (2018), bias 0.17 of an ideal 32-bit hash.
    """
    x = words ^ k0
    for key in (k1, None):
        x ^= _shift(x, 16)
        x *= 0x7FEB352D
        x ^= _shift(x, 15)
        x *= 0x846CA68B - (1 << 32)
        x ^= _shift(x, 16)
        if key is not None:
            x += key
    return x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right (torch's own keeps the sign)."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _log_uniform(bits: Tensor) -> Tensor:
    """Natural logarithm of a uniform value in (0, 1) made from 32 random bits, float32.

    u = m 2^e with m in [sqrt(1/2), sqrt(2)); ln u = e ln 2 + ln m, ln m by the polynomial of Cephes' logf (S. Moshier).
    """
    # Sets u = (n + 1/2) / 2^31 for the upper 31 bits n: the small values, where the tail comes from, keep full precision.
    u = ((bits >> 1).bitwise_and_(0x7FFFFFFF).float() + 0.5) * 2.0**-31
    raw = u.view(torch.int32)
    # Adding the distance from sqrt(1/2) to 1 carries into the exponent exactly when the mantissa is above sqrt(1/2).
    shifted = raw + (0x3F800000 - 0x3F3504F3)
    exponent = (shifted >> 23).sub_(127).float()
    x = (shifted.bitwise_and_(0x007FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    polynomial = _horner(x, _LOG)
    square = x * x
    # The logarithm of a value just below 1 may round to a tiny positive number; -2 ln u must not be negative.
    return (polynomial * square * x + exponent * _LN2_LOW - square * 0.5 + x + exponent * _LN2_HIGH).clamp_(max=0.0)


def _unit_circle(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of a uniform angle made from 32 random bits, float32 each.

    The upper two bits choose a quadrant; the others an angle x in (-pi/4, pi/4), whose sine and cosine come from the
    polynomials of Cephes' sinf and cosf (S. Moshier).
    """
    x = ((bits & 0x3FFFFFFF).sub_(0x20000000).float() + 0.5) * (_PI / 2 * 2.0**-30)
    square = x * x
    sine = _horner(square, _SIN) * square * x + x
    cosine = _horner(square, _COS) * square * square - square * 0.5 + 1.0
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


_PI = 3.14159265358979
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
