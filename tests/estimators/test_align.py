"""`align` against least squares, its closed forms, and the mean of the same slopes."""

import pytest
import torch

from hybrid_opt import HybridOptimizer
from hybrid_opt.config.align import Align
from hybrid_opt.config.probing import Spsa
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.align import AlignEstimator
from hybrid_opt.estimators.build import build_estimator
from hybrid_opt.estimators.probing import NoiseSum
from hybrid_opt.estimators.spsa import SpsaEstimator
from hybrid_opt.noise.keys import StepKey
from tests.conftest import tiny_model, token_batch, token_losses
from tests.estimators.losses import errors_and_cosines, near, quadratic, read_all

DENSE, LOW_RANK = {"type": "dense", "distribution": "gaussian"}, {"type": "low_rank", "noise_rank": 2}
SPHERE = {"type": "dense", "distribution": "sphere"}


def options(**others):
    return {"learning_rate": 1.0, "sigma": 1.0, "perturbation": DENSE, **others}


def align(**others) -> AlignEstimator:
    return AlignEstimator(Align(type="align", **options(**others)))


@pytest.mark.parametrize(("q", "perturbation"), [(1, DENSE), (12, DENSE), (12, SPHERE), (36, DENSE)])
def test_error_and_angle_match_their_closed_forms(q, perturbation):
    errors, cosines = errors_and_cosines(align(pairs=q, perturbation=perturbation), 6, 8, 200)
    assert near(errors, 1 - q / 48)
    assert near(cosines.square(), q / 48, resolution=0.15)


def test_as_many_directions_as_values_give_the_gradient_itself():
    errors, _ = errors_and_cosines(align(pairs=12), 3, 4, 10)
    assert errors.max() < 1e-4


def test_along_steps_of_one_length_the_projection_falls_by_more_than_the_mean_of_the_same_slopes():
    """A linear loss falls by |g| cos over a step of length 1: from q = n/2 to n all of the rest is gained, the mean gains a part of it."""
    found = {}
    for q in (24, 48):
        spsa = SpsaEstimator(Spsa(type="spsa", **options(pairs=q)))
        found[q] = [errors_and_cosines(e, 6, 8, 60)[1] for e in (align(pairs=q), spsa)]
        assert (found[q][0] > found[q][1]).all()  # step by step, for the same slopes
    ours, mean = ([found[q][which].square().mean().item() for q in (24, 48)] for which in (0, 1))
    assert ours == pytest.approx([0.5, 1.0], abs=0.06)
    assert mean == pytest.approx([24 / (24 + 49), 48 / (48 + 49)], abs=0.06)


@pytest.mark.parametrize("perturbation", [DENSE, LOW_RANK], ids=["dense", "low_rank"])
def test_it_is_the_least_squares_solution(perturbation):
    model, objective, batch = quadratic()
    engine, key = LocalEngine(model), StepKey(3, 1, "align")
    estimate, cost = align(pairs=5, sigma=0.01, perturbation=perturbation).estimate(
        engine, objective, batch, ["weight", "bias"], key
    )
    z = torch.stack([
        read_all(engine, NoiseSum(estimate.perturbation, [key.fold(j)], torch.ones(1))) for j in range(5)
    ])  # fmt: skip
    objective.losses(model, batch).mean().backward()
    gradient = torch.cat([model.weight.grad.flatten(), model.bias.grad])
    expected = torch.linalg.lstsq(z, (z @ gradient)[:, None], driver="gelsd").solution[:, 0]
    assert torch.allclose(read_all(engine, estimate), expected, rtol=1e-2, atol=2e-3)
    assert (cost.forwards, cost.backwards, set(cost.statistics)) == (10, 0, {"gradient_norm", "snr"})


def test_more_directions_than_values_are_refused():
    with pytest.raises(UserError, match="13 directions of a step are not linearly independent in the 12 values"):
        errors_and_cosines(align(pairs=13), 3, 4, 1)
    masked = build_estimator(
        Align(
            type="align",
            learning_rate=1.0,
            pairs=12,
            perturbation=DENSE,
            wrappers=[{"type": "sparse_mask", "keep": 0.5, "by": "random"}],
        )
    )
    with pytest.raises(UserError, match=r"12 directions of a step are not linearly independent in the \d values"):
        errors_and_cosines(masked, 3, 4, 1)


@pytest.mark.parametrize("perturbation", [DENSE, LOW_RANK], ids=["dense", "low_rank"])
def test_it_lowers_the_loss_of_a_model(perturbation):
    document = {
        "estimators": {"align": {"type": "align", "pairs": 16, "learning_rate": 10.0, "perturbation": perturbation}},
        "schedule": {"type": "single", "estimator": "align"},
    }
    model, batch = tiny_model(), token_batch()
    hybrid = HybridOptimizer(model, token_losses, schedule=document)
    before = token_losses(model, batch).mean().item()
    for _ in range(4):
        hybrid.step(batch)
    assert token_losses(model, batch).mean().item() < before - 0.05
