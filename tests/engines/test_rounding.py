"""Stochastic rounding: always to a neighbour, right on average, and no small update lost."""

import math
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybrid_opt.config.steps import SgdRule
from hybrid_opt.engines.contract import Contribution
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.engines.rounding import _round_by_torch, round_stochastically
from hybrid_opt.engines.update_rules import build_rule
from hybrid_opt.noise.drawing import key_blocks
from hybrid_opt.noise.keys import Key
from tests.engines.test_local import Given

KEY = Key((0, "rounding")).fold("w")
N = 20_000
UPPER_HALF = -0x10000
"""The bits of a float32 that bfloat16 has too."""


def normal(count: int, number: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(number))


def rounded(wide: torch.Tensor, step: int = 0, start: int = 0) -> torch.Tensor:
    out = torch.empty(len(wide), dtype=torch.bfloat16)
    round_stochastically(wide, out, KEY, step, start)
    return out


def neighbours(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 values on both sides, that with the lower magnitude first; float32 whose lower bits are 0."""
    below = wide.view(torch.int32) & UPPER_HALF
    return below.view(torch.float32), (below + 0x10000).view(torch.float32)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 0.02, 1.0, 1e38])
def test_the_result_is_a_neighbour_and_either_one_comes_up(scale):
    wide = scale * normal(N)
    low, high = neighbours(wide)
    for step in range(3):
        result = rounded(wide, step).float()
        up = result == high
        assert torch.all(up | (result == low))
        assert 0.3 < up[wide < 0].float().mean() < 0.7
        assert 0.3 < up[wide > 0].float().mean() < 0.7


def test_values_of_bfloat16_stay_and_so_do_infinity_nan_and_minus_zero():
    largest = torch.finfo(torch.bfloat16).max
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, largest, -largest, 1.0, -2.0])
    # NaNs whose payload lies in the bits that are cut off, which would leave infinity.
    nans = torch.tensor([0x7F800001, -0x007FFFFF, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    kept = torch.cat([special, normal(1000).bfloat16().float()])
    for step in range(8):
        assert torch.equal(rounded(kept, step).view(torch.int16), kept.bfloat16().view(torch.int16))
        assert rounded(nans, step).isnan().all()


@pytest.mark.parametrize(("start", "count"), [(0, 1), (1, 7), (131_071, 3), (99_999, 150_000)])
def test_a_slice_is_rounded_as_it_is_in_the_whole(start, count):
    wide = normal(300_000)
    part = rounded(wide[start : start + count], 5, start)
    assert torch.equal(part, rounded(wide, 5)[start : start + count])
    assert count < 100 or not torch.equal(part, rounded(wide[start : start + count], 5))


def test_slices_agree_across_two_to_the_31():
    edge, wide = 1 << 31, normal(200)
    around = rounded(wide, 3, edge - 100)
    assert torch.equal(around, torch.cat([rounded(wide[:100], 3, edge - 100), rounded(wide[100:], 3, edge)]))


def test_bitwise_the_same_on_any_number_of_threads():
    wide, threads = normal(300_001), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = rounded(wide, 2)
        torch.set_num_threads(2)
        two = rounded(wide, 2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


@pytest.mark.parametrize("start", [0, 5])
def test_compiled_loop_equals_torch_operations_bitwise(start):
    wide = torch.cat([normal(50_001), torch.tensor([math.inf, -math.inf, -0.0, torch.finfo(torch.float32).max])])
    out = torch.empty(len(wide), dtype=torch.bfloat16)
    ((words, index, _),) = key_blocks([KEY], start, len(wide))
    _round_by_torch(words, index, 7 * 40503 & 0xFFFF, wide, out)
    assert torch.equal(out, rounded(wide, 7, start))


@pytest.mark.parametrize("first", [0, 123_456])
def test_the_mean_over_steps_converges_faster_than_with_independent_numbers(first):
    """Independent ones would be off by 0.41 / sqrt(n) of a unit in the last place, for n = 256 by 6.5 / n."""
    wide, n = 0.02 * normal(N), 256
    low, high = (x.double() for x in neighbours(wide))
    mean = torch.zeros(N, dtype=torch.float64)
    for step in range(first, first + n):
        mean += rounded(wide, step).double() / n
    errors = (mean - wide.double()) / (high - low).abs()
    assert errors.abs().max() < 4 / n
    assert errors.pow(2).mean().sqrt() < 1 / n
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(N)


def test_elements_are_rounded_independently():
    up = (rounded(torch.full((1 << 18,), 1 + 2**-8)) > 1).double()
    assert abs(up.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(up))
    for lag in (1, 2, 3, 64, 1024):
        assert abs(((up[:-lag] - 0.5) * (up[lag:] - 0.5)).mean()) < 4 * 0.25 / math.sqrt(len(up)), lag


# ---------------------------------------------------------------- many small updates

DIRECTION = normal(N, 1)
COURSES = {
    "equal steps in all elements": lambda step: torch.ones(N),
    "one gaussian direction": lambda step: DIRECTION,
    "one gaussian direction, slowly changing": lambda step: DIRECTION * (1 + 0.5 * math.sin(step / 10)),
    "turning": lambda step: math.cos(step / 200) * DIRECTION + math.sin(step / 200) * normal(N, 2),
}


def cosine_after_200_updates(master_weights: str, course, stride: int = 1) -> float:
    """Cosine between what 200 updates of rms 1e-5 change and what they should change."""
    layer = nn.Linear(N, 1, bias=False)
    layer.weight.data = 0.02 * normal(N, 3)[None]
    engine, rule = LocalEngine(layer.bfloat16(), master_weights=master_weights), build_rule(SgdRule(type="sgd"))
    before, intended = layer.weight.detach().double().view(-1), torch.zeros(N, dtype=torch.float64)
    for step in range(200):
        update = 1e-5 * course(step)
        intended -= update.double()
        engine.apply([Contribution(Given(update), 1.0, ["weight"], 1.0, rule)], step * stride)
    change = layer.weight.detach().double().view(-1) - before
    return torch.cosine_similarity(change, intended, dim=0).item()


@pytest.mark.parametrize("kind", COURSES)
def test_200_updates_of_1e_5_add_up(kind):
    assert cosine_after_200_updates("stochastic_rounding", COURSES[kind]) > 0.99
    assert cosine_after_200_updates("none", COURSES[kind]) < 0.6


@pytest.mark.parametrize("stride", [2, 10, 13])
def test_updates_add_up_where_others_take_the_steps_in_between(stride):
    assert cosine_after_200_updates("stochastic_rounding", COURSES["one gaussian direction"], stride) > 0.99


class _Memory(TorchDispatchMode):
    """Most bytes of tensors that were made inside and alive at the same time."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.alive[id(t)] = t.untyped_storage().nbytes()
                weakref.finalize(t, partial(self.alive.pop, id(t), None))
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


class Added(Given):
    """An Estimate that takes no memory."""

    def add_to(self, out, shard, factor):
        out.add_(factor * self.value)


def test_one_parameter_at_a_time_has_a_float32_copy():
    size = 1 << 20
    model = nn.ModuleList([nn.Linear(1024, 1024, bias=False) for _ in range(4)]).bfloat16()
    engine = LocalEngine(model, master_weights="stochastic_rounding")
    assert all(engine.masters[name] is p for name, p in model.named_parameters())
    contribution = Contribution(Added(1e-5), 1.0, list(engine.parameters), 1.0, build_rule(SgdRule(type="sgd")))
    with _Memory() as memory:
        engine.apply([contribution], 0)
    assert 4 * size <= memory.peak < 6 * size
