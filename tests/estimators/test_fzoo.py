"""FZOO against its closed forms, its formula written out, and what it reuses."""

import math

import pytest
import torch
from pydantic import ValidationError

from hybrid_opt import HybridOptimizer
from hybrid_opt.config.fzoo import Fzoo
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.estimators.fzoo import FzooEstimator
from hybrid_opt.estimators.noise import StepKey
from hybrid_opt.estimators.probing import NoiseSum
from hybrid_opt.objectives.contract import FunctionObjective
from tests.conftest import tiny_model, token_batch, token_losses
from tests.estimators.losses import LinearLoss, near, quadratic, read_all

LOW_RANK = {"type": "low_rank", "noise_rank": 1}


def build(**options) -> FzooEstimator:
    return FzooEstimator(Fzoo(**{"type": "fzoo", "learning_rate": 1.0, "sigma": 1.0, **options}))


def on_a_line(members: int, repeats: int, sigma: float = 0.5):
    """For a linear loss of 6 x 8 weights: estimates (repeats, 48), standard deviations s (repeats,), and the gradient."""
    model = LinearLoss(6, 8)
    engine, objective, found = LocalEngine(model), FunctionObjective(model.losses), []
    for i in range(repeats):
        estimator = build(population_size=members, sigma=sigma)
        found.append(estimator.estimate(engine, objective, torch.eye(8)[None], ["layer.weight"], StepKey(0, i, "fzoo")))
    estimates = torch.stack([read_all(engine, estimate) for estimate, _ in found])
    return estimates, torch.tensor([cost.loss_spread for _, cost in found]), model.gradient.flatten()


def test_the_variance_of_the_losses_is_that_of_the_gradient():
    _, spreads, g = on_a_line(4, 400)
    assert near((spreads / (0.5 * g.norm())).square(), 1.0)  # with the divisor N it would be 3/4


@pytest.mark.parametrize("members", [4, 32])
def test_a_steps_length_is_that_of_its_closed_form(members):
    estimates, spreads, g = on_a_line(members, 300)
    squared = estimates.square().sum(1)
    normalised = squared * (spreads / (0.5 * g.norm())).square()  # without the spread's own chance: exact on average
    assert near(normalised, (48 + members - 1) / members)
    if members == 32:
        assert squared.mean().sqrt().item() == pytest.approx(math.sqrt((48 + members - 1) / members), rel=0.05)


def test_how_steep_the_loss_is_and_sigma_do_not_matter():
    for sigma in (0.5, 0.01):
        estimates, _, _ = on_a_line(6, 1, sigma)
        assert torch.allclose(estimates, on_a_line(6, 1)[0], rtol=1e-3, atol=1e-4)


def directions(engine, noise: NoiseSum) -> torch.Tensor:
    return torch.stack([read_all(engine, NoiseSum(noise.perturbation, [key], torch.ones(1))) for key in noise.keys])


@pytest.mark.parametrize("perturbation", [{"type": "dense", "distribution": "rademacher"}, LOW_RANK, {"type": "dense"}])
@pytest.mark.parametrize("members", [3, 4])
@pytest.mark.parametrize("members_per_forward", ["auto", 1, 2])
def test_it_is_its_formula_written_out(perturbation, members, members_per_forward):
    model, objective, batch = quadratic()
    engine = LocalEngine(model)
    estimator = build(
        population_size=members, sigma=0.1, perturbation=perturbation, members_per_forward=members_per_forward
    )
    estimate, cost = estimator.estimate(engine, objective, batch, ["weight", "bias"], StepKey(1, 1, "fzoo"))
    u = directions(engine, estimate)
    w = torch.cat([model.weight.flatten(), model.bias]).detach()
    losses = torch.stack([
        (batch["x"] @ at[:15].view(3, 5).T + at[15:] - batch["y"][:, :3]).pow(2).sum(1).mean()
        for at in (w, *(w + 0.1 * u))
    ])  # fmt: skip
    expected = (losses[1:] - losses[0]) @ u / (members * losses[1:].std())
    assert torch.allclose(read_all(engine, estimate), expected, rtol=1e-3, atol=1e-4)
    assert cost.loss == pytest.approx(losses[0].item(), rel=1e-5)
    assert cost.statistics == {"gradient_norm": pytest.approx(losses[1:].std().item() / 0.1, rel=1e-3)}
    assert cost.forwards == cost.forward_equivalents == members + 1


def test_reuse_puts_half_of_the_step_before_beside_half_of_a_population():
    """Each half is above the clean loss of its own step, though that step's examples were others."""
    model, objective, batch = quadratic()
    engine, names = LocalEngine(model), ["weight", "bias"]
    other = {"x": batch["x"] + 1.0, "y": batch["y"] - 3.0}
    reusing, fresh = build(population_size=6, sigma=0.1, reuse=True), build(population_size=6, sigma=0.1)
    half = build(population_size=3, sigma=0.1)
    first, cost = reusing.estimate(engine, objective, other, names, StepKey(1, 0, "fzoo"))
    alone, _ = fresh.estimate(engine, objective, other, names, StepKey(1, 0, "fzoo"))
    assert torch.equal(read_all(engine, first), read_all(engine, alone))
    assert cost.forwards == 7
    rises_before = first.coefficients[3:] * 6 * cost.loss_spread
    with torch.no_grad():
        model.weight += 0.05
    second, cost = reusing.estimate(engine, objective, batch, names, StepKey(1, 1, "fzoo"))
    new, new_cost = half.estimate(engine, objective, batch, names, StepKey(1, 1, "fzoo"))
    rises = torch.cat([rises_before, new.coefficients * 3 * new_cost.loss_spread])
    assert list(second.keys) == [*first.keys[3:], *new.keys]
    assert torch.allclose(second.coefficients, rises / (6 * rises.std()), rtol=1e-6)
    assert (cost.forwards, cost.loss, cost.loss_spread) == (4, new_cost.loss, pytest.approx(rises.std().item()))
    third, _ = reusing.estimate(engine, objective, batch, names, StepKey(1, 2, "fzoo"))
    assert list(third.keys[:3]) == list(new.keys)


def test_other_parameters_begin_with_a_whole_population():
    model, objective, batch = quadratic()
    estimator, engine = build(population_size=4, sigma=0.1, reuse=True), LocalEngine(model)
    forwards = [
        estimator.estimate(engine, objective, batch, names, StepKey(1, step, "fzoo"))[1].forwards
        for step, names in enumerate((["weight", "bias"], ["weight"], ["weight"], ["weight", "bias"]))
    ]
    assert forwards == [5, 5, 3, 5]


def document(**options) -> dict:
    fzoo = {"type": "fzoo", "population_size": 4, "learning_rate": 1e-4, **options}
    return {"estimators": {"fzoo": fzoo}, "schedule": {"type": "single", "estimator": "fzoo"}}


@pytest.mark.parametrize(
    "perturbation",
    [{"type": "dense", "distribution": "rademacher"}, LOW_RANK, {"type": "dense", "distribution": "sphere"}],
)
def test_a_resumed_run_takes_the_same_steps(perturbation, tmp_path):
    file, batch = document(reuse=True, perturbation=perturbation), token_batch()
    whole = HybridOptimizer(tiny_model(), token_losses, schedule=file)
    for step in range(4):
        if step == 2:
            torch.save({"model": whole.engine.model.state_dict(), "rest": whole.state_dict()}, tmp_path / "state.pt")
        whole.step(batch)
    saved, model = torch.load(tmp_path / "state.pt"), tiny_model()
    model.load_state_dict(saved["model"])
    resumed = HybridOptimizer(model, token_losses, schedule=file)
    resumed.load_state_dict(saved["rest"])
    assert [resumed.step(batch).costs["fzoo"].forwards for _ in range(2)] == [3, 3]
    for name, p in whole.engine.parameters.items():
        assert torch.equal(p, resumed.engine.parameters[name]), name


def test_steps_have_one_length_and_lower_the_loss():
    model, batch = tiny_model(), token_batch()
    hybrid = HybridOptimizer(model, token_losses, schedule=document(population_size=16, learning_rate=3e-3))
    start, losses = {n: p.detach().clone() for n, p in model.named_parameters()}, []
    values = sum(p.numel() for p in model.parameters())
    for step in range(12):
        losses.append(hybrid.step(batch).loss)
        if not step:
            moved = math.sqrt(sum((p - start[n]).square().sum().item() for n, p in model.named_parameters()))
    assert moved == pytest.approx(3e-3 * math.sqrt((values + 15) / 16), rel=0.4)  # the spread of 16 losses is a chance
    assert losses[-1] < losses[0] - 0.04


def test_a_plateau_takes_no_step():
    model = tiny_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def flat(model, batch):
        return token_losses(model, batch) * 0 + 0.1

    cost = HybridOptimizer(model, flat, schedule=document()).step(token_batch()).costs["fzoo"]
    assert cost.is_empty
    assert (cost.statistics["skipped"], cost.loss_spread) == (1, pytest.approx(0, abs=1e-12))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population_size": 1}, "greater than or equal to 2"),
        ({"reuse": True, "population_size": 5}, "write 6, or reuse: false"),
        ({"reuse": True, "population_size": 2}, "write 4, or reuse: false"),
        (
            {"reuse": True, "perturbation": {"type": "dense", "distribution": "orthogonal"}},
            "write distribution: sphere",
        ),
        ({"reuse": True, "wrappers": [{"type": "layer_subset", "layers": 1}]}, "layer_subset perturbed other layers"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        build(**options)
