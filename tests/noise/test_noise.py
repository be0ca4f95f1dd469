import math

import pytest
import torch

from hybrid_opt.noise import numba_kernels, torch_kernels
from hybrid_opt.noise.drawing import DISTRIBUTIONS, gaussian, key_blocks, rademacher
from hybrid_opt.noise.keys import Key

CPU = torch.device("cpu")
KEY = Key((0, 3)).fold("es", 2, "model.layers.0.weight")
PINNED_GAUSSIAN = [0.3055989146232605, 1.788367748260498, 0.22063960134983063, -1.2626769542694092]
PINNED_RADEMACHER = [-1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0]
both = pytest.mark.parametrize("draw", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)


@both
@pytest.mark.parametrize(("start", "count"), [(0, 1), (1, 1), (777, 5001), (32767, 2), (32768, 70001), (99_999, 1)])
def test_any_slice_is_the_slice_of_the_whole(draw, start, count):
    whole = draw([KEY], 0, 103_000, CPU)
    assert torch.equal(draw([KEY], start, count, CPU), whole[:, start : start + count])


@both
def test_slices_agree_across_two_to_the_31(draw):
    edge = 1 << 31
    around = draw([KEY], edge - 100, 200, CPU)
    assert torch.equal(around[:, :100], draw([KEY], edge - 100, 100, CPU))
    assert torch.equal(around[:, 100:], draw([KEY], edge, 100, CPU))
    assert not torch.equal(around[:, 100:], draw([KEY], 0, 100, CPU))


@both
def test_keys_drawn_together_equal_keys_drawn_alone(draw):
    keys = [KEY.fold(i) for i in range(50)]
    together = draw(keys, 13, 4_000, CPU)
    assert torch.equal(together, torch.cat([draw([key], 13, 4_000, CPU) for key in keys]))


@both
def test_bitwise_the_same_on_any_number_of_threads(draw):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = draw([KEY], 5, 300_001, CPU)
        torch.set_num_threads(3)
        three = draw([KEY], 5, 300_001, CPU)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


@pytest.mark.parametrize("start", [0, (1 << 31) - 7])
def test_gaussian_writes_into_given_memory_and_returns_it(start):
    keys, memory = [KEY.fold(i) for i in range(3)], torch.full((3, 1000), math.nan)
    drawn = gaussian(keys, start, 1000, CPU, out=memory)
    assert drawn.data_ptr() == memory.data_ptr()
    assert torch.equal(memory, gaussian(keys, start, 1000, CPU))


def test_values_stay_what_they_were_in_earlier_versions():
    """A saved run is only reproducible while these hold."""
    assert gaussian([Key((0,))], 0, 4, CPU)[0].tolist() == PINNED_GAUSSIAN
    assert rademacher([Key((0,))], 0, 12, CPU)[0].tolist() == PINNED_RADEMACHER


def test_global_generator_is_not_touched():
    before = torch.random.get_rng_state()
    gaussian([KEY], 0, 1000, CPU)
    rademacher([KEY], 0, 1000, CPU)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("number", range(4))
def test_gaussian_moments_and_distribution(number):
    n = 1 << 20
    x = gaussian([KEY.fold(number)], 0, n, CPU)[0].double()
    # Standard errors of the first four moments of a standard normal sample: sqrt of 1, 2, 15 and 96 over n.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - expected) < 4 * math.sqrt(variance / n), power
    steps = torch.arange(1, n + 1) / n
    distance = (torch.special.ndtr(x.sort().values) - steps).abs().max()
    assert distance < 1.63 / math.sqrt(n)  # Kolmogorov-Smirnov, 1 %
    assert 4.5 < x.abs().max() < 6.7


@pytest.mark.parametrize("number", range(4))
def test_rademacher_moments(number):
    n = 1 << 20
    x = rademacher([KEY.fold(number)], 0, n, CPU)[0]
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    assert abs(x.mean()) < 4 / math.sqrt(n)
    by_bit = x.view(-1, 32).mean(0)  # every bit of the random word is as good as any other
    assert by_bit.abs().max() < 4.5 / math.sqrt(n / 32)


@both
def test_same_shaped_layers_members_and_steps_are_independent(draw):
    n = 1 << 16
    names = [
        Key((0, step)).fold("es", member, f"layers.{i}.w") for step in (0, 1) for member in (0, 1) for i in range(12)
    ]
    x = draw(names, 0, n, CPU).double()
    correlation = torch.corrcoef(x) - torch.eye(len(names))
    assert correlation.abs().max() < 4.8 / math.sqrt(n)  # 1128 pairs


@both
def test_neighbouring_elements_are_independent(draw):
    x = draw([KEY], 0, 1 << 20, CPU)[0].double()
    for lag in (1, 2, 3, 31, 32, 33, 1024, 32768):
        assert abs((x[:-lag] * x[lag:]).mean()) < 4 / math.sqrt(len(x) - lag), lag
        assert abs((x[:-lag] ** 2 * x[lag:] ** 2).mean() - (x**2).mean() ** 2) < 4 * 3 / math.sqrt(len(x) - lag), lag


def test_logarithm_and_circle_against_float64():
    bits = torch.cat(
        [torch.randint(-(2**31), 2**31, (200_000,)), torch.tensor([-1, 0, 1, 2, -2, 2**31 - 1, -(2**31)])]
    ).int()
    u = (((bits >> 1) & 0x7FFFFFFF).double() + 0.5) / 2**31
    assert (torch_kernels._log_uniform(bits).double() - u.log()).abs().max() < 2e-6
    angle = ((bits & 0x3FFFFFFF).double() - 0x20000000 + 0.5) * (math.pi / 2 / 2**30) + (
        bits >> 30
    ).double() * math.pi / 2
    cosine, sine = torch_kernels._unit_circle(bits)
    # Quadrants come in another order than their angles, so compare the sets of points, quadrant by quadrant.
    quadrant = bits >> 30
    turn = {-2: math.pi, -1: 3 * math.pi / 2, 0: 0.0, 1: math.pi / 2}
    base = angle - (bits >> 30).double() * math.pi / 2
    expected = base + torch.tensor([turn[q] for q in quadrant.tolist()])
    assert (cosine.double() - expected.cos()).abs().max() < 3e-7
    assert (sine.double() - expected.sin()).abs().max() < 3e-7


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "bits"])
@pytest.mark.parametrize(("start", "count"), [(0, 200_000), (5, 70_001), (31, 1)])
def test_compiled_loops_equal_torch_operations_bitwise(distribution, start, count):
    """GPUs run the operations, CPUs the loops; a run may move from one to the other."""
    ((keys, _, _),) = key_blocks([KEY.fold(i) for i in range(3)], 0, 1)
    one, other = torch.empty(3, count), torch.empty(3, count)
    numba_kernels.fill(distribution, keys, start, one)
    torch_kernels.fill(distribution, keys, start, other)
    assert torch.equal(one, other)


def test_random_bits_are_uniform():
    n = 1 << 20
    ((words, _, _),) = key_blocks([KEY], 0, n)
    out = torch.empty(1, n)
    numba_kernels.fill("bits", words, 0, out)
    x = out[0].int()
    assert x.min() >= 0
    assert x.max() < 1 << 16
    counts = torch.bincount(x >> 8, minlength=256).double()
    assert ((counts - n / 256) ** 2).sum() / (n / 256) < 330  # chi-square with 255 degrees of freedom, 0.1 %
