"""The noise of `drawing.py` on a CPU, compiled by numba. Next: `torch_kernels.py`, the same values on any other device.

One idea: a block of a few thousand values is computed in cache, by plain loops that the compiler turns into vector
instructions, so noise costs about as much as writing it to memory. The compiler contracts no product and sum into one
operation unless it is allowed to, so every operation rounds as IEEE 754 says.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
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

WORDS = 4096
"""Random words computed at a time."""
SINGLE = 1 << 16
"""Values below which a second thread costs more than it saves."""

f32, i32, u32 = np.float32, np.int32, np.uint32
ONE, HALF, ZERO, MINUS_TWO = f32(1), f32(0.5), f32(0), f32(-2)
U, A, LOW, HIGH = f32(UNIFORM), f32(ANGLE), f32(LN2_LOW), f32(LN2_HIGH)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = (f32(c) for c in LOG)
S0, S1, S2 = (f32(c) for c in SIN)
C0, C1, C2 = (f32(c) for c in COS)
M0, M1 = (u32(c) for c in MIXER)


def _compiled(signature: str):
    """Compiled now, and kept on disk where numba finds a folder that it may write to."""

    def decorate(function):
        try:
            return numba.njit(signature, nogil=True, cache=True, error_model="numpy")(function)
        except RuntimeError:  # no such folder
            return numba.njit(signature, nogil=True, error_model="numpy")(function)

    return decorate


@numba.njit(inline="always")
def _round_of_mixing(x):
    # numba widens a product of 32-bit integers to 64 bits, so each result is cut back.
    x = u32(x ^ (x >> u32(16)))
    x = u32(x * M0)
    x = u32(x ^ (x >> u32(15)))
    x = u32(x * M1)
    return u32(x ^ (x >> u32(16)))


@numba.njit(inline="always")
def _hash(word, k0, k1):
    return _round_of_mixing(u32(_round_of_mixing(u32(word ^ k0)) + k1))


@_compiled("void(uint32, uint32[::1], float32[::1], int64)")
def _gaussian_block(first, key, out, words) -> None:
    # Read once: for all that the compiler knows, a store to `out` might change them.
    k0, k1, k2, k3 = key[0], key[1], key[2], key[3]
    uniform = np.empty(words, f32)
    raw = uniform.view(np.int32)
    exponent = np.empty(words, i32)
    for j in range(words):
        uniform[j] = (f32(i32(_hash(u32(first + u32(j)), k0, k1) >> u32(1))) + HALF) * U
    for j in range(words):
        shifted = i32(raw[j] + i32(0x3F800000 - BOUNDARY))
        exponent[j] = i32(shifted >> i32(23)) - i32(127)
        raw[j] = i32(shifted & i32(0x007FFFFF)) + i32(BOUNDARY)
    for j in range(words):
        x, e = uniform[j] - ONE, f32(exponent[j])
        square = x * x
        p = (((((((L0 * x + L1) * x + L2) * x + L3) * x + L4) * x + L5) * x + L6) * x + L7) * x + L8
        log = p * square * x + e * LOW - square * HALF + x + e * HIGH
        uniform[j] = np.sqrt(min(log, ZERO) * MINUS_TWO)
    for j in range(words):
        bits = i32(_hash(u32(first + u32(j)), k2, k3))
        x = (f32(i32(i32(bits & i32(0x3FFFFFFF)) - i32(0x20000000))) + HALF) * A
        square = x * x
        sine = ((S0 * square + S1) * square + S2) * square * x + x
        cosine = ((C0 * square + C1) * square + C2) * square * square - square * HALF + ONE
        quadrant = bits >> i32(30)
        sign = f32(quadrant | i32(1))
        odd = quadrant & i32(1)
        out[2 * j] = (-sine if odd else cosine) * sign * uniform[j]
        out[2 * j + 1] = (cosine if odd else sine) * sign * uniform[j]


@_compiled("void(uint32, uint32[::1], float32[::1], int64)")
def _rademacher_block(first, key, out, words) -> None:
    k0, k1 = key[0], key[1]
    for j in range(words):
        bits = _hash(u32(first + u32(j)), k0, k1)
        for b in range(32):
            out[32 * j + b] = f32(i32((bits >> u32(b)) & u32(1))) * f32(2) - ONE


@_compiled("void(uint32, uint32[::1], float32[::1], int64)")
def _bits_block(first, key, out, words) -> None:
    k0, k1 = key[0], key[1]
    for j in range(words):
        bits = _hash(u32(first + u32(j)), k0, k1)
        out[2 * j] = f32(i32(bits & u32(0xFFFF)))
        out[2 * j + 1] = f32(i32(bits >> u32(16)))


@_compiled("void(int64, int64, uint32[:, ::1], int64, float32[:, :])")
def _fill(kind, per_word, keys, start, out) -> None:
    """Values from `start` on for each key, where `start` need not be the first of its word."""
    values = np.empty(2 * WORDS, f32)
    size = len(values) // per_word
    for row in range(out.shape[0]):
        at, count = 0, out.shape[1]
        while at < count:
            word = (start + at) // per_word
            skip = start + at - word * per_word
            words = min(size, (skip + count - at + per_word - 1) // per_word)
            if kind == 0:
                _gaussian_block(u32(word), keys[row], values, words)
            elif kind == 1:
                _rademacher_block(u32(word), keys[row], values, words)
            else:
                _bits_block(u32(word), keys[row], values, words)
            n = min(words * per_word - skip, count - at)
            out[row, at : at + n] = values[skip : skip + n]
            at += n


def fill(distribution: str, keys: Tensor, start: int, out: Tensor) -> None:
    """Writes values `start`, `start + 1`, ... of each key to `out` (keys, count) float32, on all of torch's threads.

    Args:
        distribution: `gaussian`, `rademacher`, or `bits` for integers below 2^16.
        keys: four 32-bit words a key, (keys, 4) int32.
        start: index within the block of 2^31 values that the keys are made for.
    """
    words, values = keys.numpy().view(np.uint32), out.numpy()
    arguments = (list(PER_WORD).index(distribution), PER_WORD[distribution])
    if len(out) >= torch.get_num_threads():
        _on_all_threads(
            len(out), out.numel(), lambda first, last: _fill(*arguments, words[first:last], start, values[first:last])
        )
    else:
        _on_all_threads(
            out.shape[1],
            out.numel(),
            lambda first, last: _fill(*arguments, words, start + first, values[:, first:last]),
        )


def _on_all_threads(count: int, work: int, piece: Callable[[int, int], None]) -> None:
    """Calls `piece(first, last)` for even parts of `count` things, on torch's number of threads if the work is worth it."""
    threads = min(torch.get_num_threads(), count, -(-work // SINGLE))
    if threads <= 1:
        return piece(0, count)
    cuts = [i * count // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(piece, cuts[:-1], cuts[1:]))


@_compiled("void(uint32[::1], int64, uint32, uint32[::1], uint16[::1])")
def _round(key, start, shift, wide, out) -> None:
    k0, k1 = key[0], key[1]
    for i in range(len(wide)):
        at, raw = start + i, wide[i]
        drawn = u32(_hash(u32(at >> 1), k0, k1) >> u32(16 * (at & 1)))
        up = u32(raw + u32(u32(drawn + shift) & u32(0xFFFF)))
        if (raw & u32(0x7F800000)) == u32(0x7F800000):  # infinite, or NaN, which must not become infinite
            up = u32(raw | u32(0x00400000)) if raw & u32(0x007FFFFF) else raw
        out[i] = np.uint16(up >> u32(16))


def round_up_or_down(key: Tensor, start: int, shift: int, wide: Tensor, out: Tensor) -> None:
    """Rounds float32 (numel,) to bfloat16 (numel,); see `rounding.py`.

    Args:
        key: four 32-bit words, (1, 4) int32.
        start: as for `fill`.
        shift: added to every 16 random bits, modulo 2^16.
    """
    words = key.numpy().view(np.uint32)[0]
    source, target = wide.view(torch.int32).numpy().view(np.uint32), out.view(torch.int16).numpy().view(np.uint16)
    _on_all_threads(len(wide), len(wide), lambda a, b: _round(words, start + a, shift, source[a:b], target[a:b]))
