import pytest
import torch

from hybrid_opt.estimators.shaping import centered_rank, none, standardize


def test_none_is_the_losses():
    assert none(torch.tensor([3.0, 1.0])).tolist() == [3.0, 1.0]


def test_standardize_has_mean_0_and_population_standard_deviation_1():
    w = standardize(torch.tensor([1.0, 2.0, 3.0, 10.0, -4.0]))
    assert w.mean().item() == pytest.approx(0, abs=1e-12)
    assert w.pow(2).mean().item() == pytest.approx(1, abs=1e-8)
    assert standardize(torch.full((6,), 2.0)).tolist() == [0.0] * 6


def test_centered_rank_by_hand_and_its_mean_square():
    assert centered_rank(torch.tensor([0.3, -1.0, 5.0])).tolist() == [0.0, -1.0, 1.0]
    for n in (2, 7, 30):
        w = centered_rank(torch.randn(n, generator=torch.Generator().manual_seed(n)))
        assert w.pow(2).mean().item() == pytest.approx((n + 1) / (3 * (n - 1)))
        assert (w.min().item(), w.max().item()) == (-1.0, 1.0)


def test_equal_losses_share_their_mean_rank():
    assert centered_rank(torch.tensor([1.0, 1.0, 0.0, 2.0, 2.0])).tolist() == [-0.25, -0.25, -1.0, 0.75, 0.75]
    assert centered_rank(torch.ones(4)).tolist() == [0.0] * 4
