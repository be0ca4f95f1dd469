"""Members compared on what they saw, against values worked out by hand."""

import math

import pytest
import torch

from hybrid_opt.estimators.fitness import fitness, worst_for_missing
from hybrid_opt.estimators.population import STEPS, PopulationWatch

LOSSES = torch.tensor([[0.0, -1.0, -1.0], [0.0, 0.0, -1.0], [0.0, -1.0, 0.0], [0.0, 0.0, -1.0]])
SAME = torch.arange(3).expand(4, 3)


def test_none_is_the_mean():
    found = fitness(LOSSES, SAME, "none")
    assert found.values.tolist() == pytest.approx([-2 / 3, -1 / 3, -1 / 3, -1 / 3])
    assert not found.is_flat


def test_mean_takes_each_examples_mean_off():
    # Means over members: 0, -1/2, -3/4.
    assert fitness(LOSSES, SAME, "mean").values.tolist() == pytest.approx([-0.25, 1 / 12, 1 / 12, 1 / 12])


def test_standardize_leaves_out_what_all_agree_on():
    found = fitness(LOSSES, SAME, "standardize")
    second, third = [-1, 1, -1, 1], [x / math.sqrt(3 / 16) for x in (-1 / 4, -1 / 4, 3 / 4, -1 / 4)]
    assert found.values.tolist() == pytest.approx([(a + b) / 3 for a, b in zip(second, third, strict=True)])
    assert found.left_out == 1


def test_pairs_that_see_other_examples_are_compared_with_each_other():
    examples = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]])
    losses = torch.tensor([[1.0, 2.0], [3.0, 2.0], [50.0, 60.0], [40.0, 60.0]])
    assert fitness(losses, examples, "mean").values.tolist() == [-0.5, 0.5, 2.5, -2.5]
    found = fitness(losses, examples, "standardize")
    assert found.values.tolist() == [-0.5, 0.5, 0.5, -0.5]
    assert found.left_out == 2


@pytest.mark.parametrize("baseline", ["none", "mean", "standardize"])
def test_equal_members_are_flat_whatever_the_rounding(baseline):
    losses = torch.tensor([[0.1, 0.7, 1 / 3]]).expand(7, 3)
    assert fitness(losses, torch.arange(3).expand(7, 3), baseline).is_flat


def test_missing_losses_are_the_worst():
    losses = torch.tensor([[math.nan, -1.0], [0.5, -2.0]])
    assert worst_for_missing(losses, losses.isnan()).tolist() == [[0.5, -1.0], [0.5, -2.0]]
    assert worst_for_missing(torch.tensor([math.nan, -math.inf]), torch.tensor([True, True])).tolist() == [0.0, 0.0]


def test_a_missing_member_is_the_worst_on_each_example():
    losses, missing = torch.tensor([[1.0, 5.0], [math.inf, 9.0], [2.0, 3.0]]), torch.tensor([[False], [True], [False]])
    found = worst_for_missing(losses, missing.expand(3, 2), by_example=True)
    assert found.tolist() == [[1.0, 5.0], [2.0, 5.0], [2.0, 3.0]]
    assert worst_for_missing(losses, torch.ones(3, 2).bool(), by_example=True).tolist() == [[0.0, 0.0]] * 3


# ---------------------------------------------------------------- population


def watch(pairs, steps=STEPS, seed=0, noise=0.0, ties=0.0):
    """Losses of pairs along a linear loss with slope 1, with independent noise, and with a share of tied pairs."""
    generator = torch.Generator().manual_seed(seed)
    seen = PopulationWatch()
    for _ in range(steps):
        slope = torch.randn(pairs, generator=generator)
        tied = torch.rand(pairs, generator=generator) < ties
        slope[tied] = 0
        plus, minus = (noise * torch.randn(pairs, generator=generator) for _ in range(2))
        losses = torch.stack([5 + slope + plus, 5 - slope + minus], dim=1)
        losses[tied] = 5.0
        seen.see(losses.flatten())
    return seen


def test_the_number_that_would_do_follows_the_formula():
    assert watch(50).needed() == 4  # no noise: q = 2
    assert watch(400, steps=9, noise=1.0).needed() == pytest.approx(
        2 * (1 + 1.5), abs=1
    )  # R = 1 / 1.5: even var 1/2, odd 1 + 1/2
    tied = watch(1000, steps=9, ties=0.9)  # one pair in ten differs, and pairs have no noise
    assert tied.needed() == pytest.approx(2 * 2 / 0.1, rel=0.1)


def test_a_step_of_that_many_pairs_goes_downhill_five_times_out_of_six():
    generator = torch.Generator().manual_seed(1)
    noise, trials = 3.0, 4000
    signal = 1 / (1 + noise**2 / 2)  # the odd part's variance is 1 + noise^2 / 2
    pairs = math.ceil(1 + 1 / signal)
    slope = torch.randn(trials, pairs, generator=generator)
    odd = slope + noise * torch.randn(trials, pairs, generator=generator) / 2**0.5
    downhill = ((odd * slope).mean(dim=1) > 0).double().mean().item()
    assert 0.82 < downhill < 0.89  # 5/6 for a bell curve; the projection is a little skew


def test_a_small_population_is_told_the_number_once():
    with pytest.warns(
        RuntimeWarning, match=r"population_size 8: in 10 steps \d+ of 40 pairs .* population_size \d+ would"
    ) as said:
        watch(4, steps=2 * STEPS, ties=0.8)
    assert len(said) == 1


def test_noise_alone_needs_something_else():
    seen, losses = PopulationWatch(), torch.tensor([0.0, 0.1, 2.0, 2.1])
    for step in range(STEPS - 1):
        seen.see(losses + step)
    with pytest.warns(RuntimeWarning, match="no signal is to be seen"):
        seen.see(losses)
    assert seen.needed() is None
