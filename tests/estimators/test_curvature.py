"""SPSA's `curvature_floor` against the Hessian of a quadratic loss."""

import pytest
import torch
from pydantic import ValidationError

from hybrid_opt import HybridOptimizer
from hybrid_opt.config.probing import Spsa
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.estimators.probing import NoiseSum
from hybrid_opt.estimators.spsa import SpsaEstimator
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import FunctionObjective
from tests.conftest import tiny_model, token_batch, token_losses
from tests.estimators.losses import quadratic, read_all

DENSE, LOW_RANK = {"type": "dense", "distribution": "gaussian"}, {"type": "low_rank", "noise_rank": 2}
KEY = StepKey(4, 2, "spsa")


def build(**options) -> SpsaEstimator:
    # The loss is quadratic, so differences over a large sigma are exact, and rounding is small.
    return SpsaEstimator(Spsa(**{"type": "spsa", "learning_rate": 1.0, "sigma": 0.5, "pairs": 3, **options}))


def estimated(estimator: SpsaEstimator):
    """The estimate (18,), its cost, and for each direction z (pairs, 18) the exact slope and curvature `z^T H z`."""
    model, objective, batch = quadratic()
    engine = LocalEngine(model)
    estimate, cost = estimator.estimate(engine, objective, batch, ["weight", "bias"], KEY)
    keys = [KEY.fold(j) for j in range(estimator.config.pairs)]
    z = torch.stack([read_all(engine, NoiseSum(estimate.perturbation, [key], torch.ones(1))) for key in keys])
    w = torch.cat([model.weight.flatten(), model.bias]).detach()
    gradient, hessian = torch.func.grad(loss_at)(w, batch), torch.func.hessian(loss_at)(w, batch)
    return read_all(engine, estimate), cost, z, z @ gradient, torch.einsum("ji,ik,jk->j", z, hessian, z)


def loss_at(w, batch):
    return (batch["x"] @ w[:15].view(3, 5).T + w[15:] - batch["y"][:, :3]).pow(2).sum(1).mean()


@pytest.mark.parametrize("perturbation", [DENSE, LOW_RANK], ids=["dense", "low_rank"])
def test_each_slope_is_divided_by_the_curvature_along_its_direction(perturbation):
    estimate, cost, z, slopes, bends = estimated(build(curvature_floor=1e-3, perturbation=perturbation))
    assert cost.statistics["curvature"] == pytest.approx(bends.mean().item(), rel=1e-4)
    assert torch.allclose(estimate, (slopes / bends) @ z / 3, rtol=1e-3, atol=1e-4)
    assert bends.max() > 1.5 * bends.min()  # one factor for all would not do


def test_a_curvature_below_the_floor_counts_as_the_floor():
    *_, bends = estimated(build(perturbation=DENSE))
    floor = bends.sort().values[1].item() * 1.01  # two of the three are below it
    estimate, _, z, slopes, _ = estimated(build(curvature_floor=floor, perturbation=DENSE))
    assert torch.allclose(estimate, (slopes / bends.clamp(min=floor)) @ z / 3, rtol=1e-3, atol=1e-4)


def test_where_the_loss_bends_downwards_the_step_still_goes_down():
    model, objective, batch = quadratic()
    engine = LocalEngine(model)
    negated = FunctionObjective(lambda model, batch: -objective.losses(model, batch))
    convex, concave = (
        build(curvature_floor=1e-3).estimate(engine, loss, batch, ["weight", "bias"], KEY)
        for loss in (objective, negated)
    )
    assert torch.allclose(read_all(engine, convex[0]), -read_all(engine, concave[0]), rtol=1e-4, atol=1e-5)
    assert convex[1].statistics["curvature"] == pytest.approx(-concave[1].statistics["curvature"], rel=1e-4)


def test_one_pair_at_learning_rate_1_steps_to_the_minimum_along_its_direction():
    model, objective, batch = quadratic()
    spsa = {"type": "spsa", "learning_rate": 1.0, "sigma": 0.5, "perturbation": DENSE, "curvature_floor": 1e-3}
    document = {"estimators": {"spsa": spsa}, "schedule": {"type": "single", "estimator": "spsa"}}
    hybrid = HybridOptimizer(model, objective, schedule=document)
    before = objective.losses(model, batch).mean().item()
    found = hybrid.step(batch).costs["spsa"].statistics
    after = objective.losses(model, batch).mean().item()
    assert before - after == pytest.approx(found["gradient_norm"] ** 2 / (2 * found["curvature"]), rel=1e-3)
    assert before - after > 1e-3


def test_it_costs_one_forward_pass_more_and_says_nothing_when_off():
    batch = token_batch()
    for floor, forwards in ((None, 4), (0.1, 5)):
        spsa = {"type": "spsa", "learning_rate": 1e-6, "pairs": 2, "curvature_floor": floor}
        document = {"estimators": {"spsa": spsa}, "schedule": {"type": "single", "estimator": "spsa"}}
        hybrid = HybridOptimizer(tiny_model(), token_losses, schedule=document)
        cost = hybrid.step(batch).costs["spsa"]
        assert cost.forwards == hybrid.config.estimators["spsa"].forwards == forwards
        assert cost.forward_equivalents == forwards
        assert ("curvature" in cost.statistics) == (floor is not None)


def test_a_floor_of_zero_is_refused():
    with pytest.raises(ValidationError, match="curvature_floor"):
        build(curvature_floor=0.0)


def test_steps_that_follow_the_evaluated_direction_refuse_relative_sigma():
    with pytest.raises(ValidationError, match=r"relative_sigma does not suit spsa: .*drop curvature_floor"):
        Spsa(type="spsa", learning_rate=1.0, curvature_floor=1.0, wrappers=[{"type": "relative_sigma"}])
