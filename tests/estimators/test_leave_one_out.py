"""`fitness_shaping: leave_one_out` against its closed forms."""

import pytest
import torch

from hybrid_opt.config.probing import EvolutionStrategy
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.estimators.es import EsEstimator
from hybrid_opt.estimators.noise import StepKey
from hybrid_opt.estimators.shaping import leave_one_out
from tests.estimators.losses import errors_and_cosines, near, quadratic, read_all


def build(**options) -> EsEstimator:
    dense = {"type": "dense", "distribution": "gaussian"}
    settings = {"type": "es", "learning_rate": 1.0, "sigma": 1.0, "perturbation": dense}
    return EsEstimator(EvolutionStrategy(**{**settings, **options}))


def test_it_is_the_difference_from_the_mean_of_the_others():
    losses = torch.tensor([3.0, 1.0, -2.0, 8.0])
    others = [losses[torch.arange(4) != i].mean().item() for i in range(4)]
    assert leave_one_out(losses).tolist() == pytest.approx((losses - torch.tensor(others)).tolist())
    assert leave_one_out(losses + 100).tolist() == pytest.approx(leave_one_out(losses).tolist())


@pytest.mark.parametrize("members", [2, 8])
def test_one_sided_estimates_have_no_bias_and_the_error_of_one_member_less(members):
    """With a linear loss `MSE/|g|^2 = (d + 1)/(N - 1)`, which a bias by a factor such as N/(N - 1) would raise."""
    errors, _ = errors_and_cosines(
        build(population_size=members, antithetic=False, fitness_shaping="leave_one_out"), 3, 4, 1500
    )
    assert near(errors, 13 / (members - 1))


def test_antithetic_estimates_are_longer_by_a_factor():
    model, objective, batch = quadratic()
    engine, arguments = LocalEngine(model), (["weight", "bias"], StepKey(3, 1, "es"))
    shaped, plain = (
        read_all(engine, build(population_size=6, sigma=0.01, fitness_shaping=shaping).estimate(
            engine, objective, batch, *arguments)[0])
        for shaping in ("leave_one_out", "none")
    )  # fmt: skip
    assert torch.allclose(shaped, plain * (6 / 5), rtol=1e-4, atol=1e-5)
