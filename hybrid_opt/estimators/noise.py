"""Noise as a pure function of a key and an element's index. Next: `noise_cpu.py`.

One idea: nothing is ever drawn from a generator with a state. The value of element i is computed from i, so any slice
of a tensor's noise is the slice of the whole, bitwise, whatever the device, thread count or sharding.

An index is hashed to 32 random bits by the `lowbias32` mixer applied twice, with a key word before each time; the second
key word keeps two streams from being shifted or permuted copies of each other. Source of the mixer: C. Wellons,
"Prospecting for Hash Functions" (2018), bias 0.17 of an ideal 32-bit hash.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hybrid_opt.estimators import noise_cpu, noise_torch

INDEX_BITS = 31
"""An index's higher bits enter through the key, so tensors may have more than 2^31 elements."""


class Key:
    """The origin of a stream of noise: a seed and everything folded into it, such as step, member and name.

    Two keys with different parts give independent streams; equal keys give equal ones. Immutable.

    Args:
        parts: integers and strings.
    """

    __slots__ = ("text",)

    def __init__(self, parts: Sequence[int | str]):
        self.text = "".join(f"{part!r}," for part in parts)

    @classmethod
    def from_text(cls, text: str) -> "Key":
        """The key that has this `text`."""
        key = Key(())
        key.text = text
        return key

    def fold(self, *parts: int | str) -> "Key":
        """A new key that also depends on `parts`."""
        key = Key(parts)
        key.text = self.text + key.text
        return key

    def seed(self) -> int:
        """A non-negative integer of 63 bits, for libraries that want a seed."""
        return int.from_bytes(self.digest(8), "little") >> 1

    def digest(self, size: int, suffix: str = "") -> bytes:
        """`size` bytes that depend on all parts, and on a suffix."""
        return hashlib.blake2b((self.text + suffix).encode(), digest_size=size).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Key(({self.text}))"


class StepKey(Key):
    """The key of an estimator's noise in one step.

    Args:
        seed: of the run.
        step: number of the step.
        estimator: name of the estimator.
    """

    __slots__ = ("origin",)

    def __init__(self, seed: int, step: int, estimator: str):
        super().__init__((seed, step, estimator))
        self.origin = (seed, step, estimator)

    def lasting(self, steps: int, *parts: int | str) -> Key:
        """A key that is the same for `steps` steps, counted from the run's first, and depends on `parts`."""
        seed, step, estimator = self.origin
        return Key((seed, "lasting", step // steps, estimator)).fold(*parts)


Distribution = Callable[[Sequence[Key], int, int, torch.device], Tensor]


def gaussian(keys: Sequence[Key], start: int, count: int, device: torch.device, out: Tensor | None = None) -> Tensor:
    """Elements `start` to `start + count` of the standard normal noise of each key, float32 (keys, count).

    Box-Muller: with u, v uniform in (0, 1), `sqrt(-2 ln u) cos(2 pi v)` and `sqrt(-2 ln u) sin(2 pi v)` are independent
    standard normal values; they become elements 2j and 2j + 1.

    Args:
        out: memory to use for the result, of its shape and dtype; None: new memory.
    """
    return _draw("gaussian", keys, start, count, device, out)


def rademacher(keys: Sequence[Key], start: int, count: int, device: torch.device) -> Tensor:
    """Elements `start` to `start + count` of each key's -1 / +1 noise, float32 (keys, count); 32 from each random word."""
    return _draw("rademacher", keys, start, count, device)


DISTRIBUTIONS: dict[str, Distribution] = {"gaussian": gaussian, "rademacher": rademacher}


def block_size(device: torch.device) -> int:
    """Elements to work on at a time: few enough for a processor's cache, or enough to fill a GPU."""
    return 1 << 18 if device.type == "cpu" else 1 << 24


def key_blocks(keys: Sequence[Key], start: int, count: int) -> Iterator[tuple[Tensor, int, slice]]:
    """The elements `start` to `start + count` by blocks of 2^31, each of which has key words of its own.

    Yields:
        Four 32-bit words a key, (keys, 4) int32; the index of the first element within the block; the elements' place.
    """
    at, stop = start, start + count
    while keys and at < stop:
        high, index = at >> INDEX_BITS, at & ((1 << INDEX_BITS) - 1)
        end = min(stop, (high + 1) << INDEX_BITS)
        suffix = str(high)
        digests = bytearray(b"".join(key.digest(16, suffix) for key in keys))
        yield torch.frombuffer(digests, dtype=torch.int32).view(len(keys), 4), index, slice(at - start, end - start)
        at = end


def _draw(
    distribution: str, keys: Sequence[Key], start: int, count: int, device: torch.device, out: Tensor | None = None
) -> Tensor:
    if out is None:
        out = torch.empty(len(keys), count, device=device, dtype=torch.float32)
    fill = noise_cpu.fill if device.type == "cpu" else noise_torch.fill
    for words, index, place in key_blocks(keys, start, count):
        fill(distribution, words, index, out[:, place])
    return out
