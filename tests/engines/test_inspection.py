"""Checksums against their formula in Python's integers, and which changes they notice; finding values that are not finite."""

import math
import struct

import pytest
import torch

from hybrid_opt.engines.inspection import PLACES, checksum, first_nonfinite


def written_out(values: torch.Tensor) -> int:
    """The sum over all words of 8 bytes, the last filled up with zeros, each times an odd number for its place."""
    raw = bytes(values.contiguous().view(torch.uint8).tolist())
    words = struct.unpack(f"<{len(raw) // 8 + 1}q", raw + bytes(8 - len(raw) % 8))
    total = sum(word * (2 * (i % PLACES) + 1) for i, word in enumerate(words)) % 2**64
    return total - 2**64 * (total >= 2**63)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 2 * PLACES, 4 * PLACES + 5])
def test_it_is_the_sum_of_words(dtype, count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).mul(10).to(dtype)
    assert checksum(values).item() == written_out(values)
    longer = torch.cat([values[:1], values])  # where words begin elsewhere
    assert checksum(longer[1:]).item() == written_out(values)
    assert checksum(torch.empty(0, dtype=dtype)).item() == 0


@pytest.mark.parametrize("place", [0, 1, 2, 1001, 2 * PLACES, 40_000])
def test_every_change_of_one_value_is_noticed(place):
    values = torch.randn(40_001, generator=torch.Generator().manual_seed(0))
    before = checksum(values)
    for bit in (0, 1, 22, 30, 31):
        changed = values.clone()
        changed.view(torch.int32)[place] ^= -(2**31) if bit == 31 else 2**bit
        assert checksum(changed) != before, bit
    changed = values.clone()
    changed[place], changed[place - 3] = values[place - 3], values[place]
    assert checksum(changed) != before


def test_zeros_of_both_signs_differ():
    assert checksum(torch.tensor([0.0, -0.0])) != checksum(torch.tensor([0.0, 0.0]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_tensor_that_is_not_finite_is_named(value, dtype):
    bad = torch.zeros(3, 5, dtype=dtype)
    bad[2, 1] = value
    assert first_nonfinite([("a", torch.ones(4)), ("none", torch.empty(0)), ("b", bad), ("c", bad)]) == "b"


def test_a_sum_that_overflows_is_looked_at():
    assert first_nonfinite([("a", torch.full((4,), 3e38)), ("b", torch.full((4,), 6e4).half())]) is None
    assert first_nonfinite([("a", torch.full((4,), 3e38)), ("b", torch.tensor([math.inf, -math.inf]))]) == "b"
    assert first_nonfinite([]) is None
