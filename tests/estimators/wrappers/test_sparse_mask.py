"""Sparse steps: only what is in the mask is perturbed and moved, as well as the closed form says, and masks last."""

import pytest
import torch
from pydantic import ValidationError

from hybrid_opt import HybridOptimizer
from hybrid_opt.config import load_schedule
from hybrid_opt.config.align import Align
from hybrid_opt.config.estimators import StaleGradient
from hybrid_opt.config.forward_gradient import ForwardGradient
from hybrid_opt.config.probing import EvolutionStrategy, Spsa
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.build import build_estimator
from hybrid_opt.estimators.contract import innermost
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import FunctionObjective
from hybrid_opt.perturbations.masks import size_of, unpacked
from tests.conftest import tiny_model, token_batch, token_losses
from tests.estimators.losses import LinearLoss, near, read_all

DENSE = {"type": "dense"}
CAP, SUBSET = {"type": "norm_cap", "norm": 0.1}, {"type": "layer_subset", "layers": 2}


def mask(by: str = "small_magnitude", keep: float = 0.25, refresh: int = 1000) -> dict:
    return {"type": "sparse_mask", "by": by, "keep": keep, "refresh": refresh}


def config(*wrappers: dict, **options) -> Spsa:
    options = {"type": "spsa", "learning_rate": 1.0, "sigma": 0.01, "perturbation": DENSE, **options}
    return Spsa(wrappers=wrappers, **options)


@pytest.mark.parametrize("by", ["small_magnitude", "random"])
def test_mean_square_error_matches_its_closed_form(by):
    model, q = LinearLoss(6, 8), 2
    model.layer.weight.data = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    engine, estimator = LocalEngine(model), build_estimator(config(mask(by), sigma=0.1, pairs=q))
    g, found = model.gradient.flatten(), []
    for step in range(600):
        arguments = (torch.eye(8)[None], ["layer.weight"], StepKey(0, step, "spsa"))
        estimate, _ = estimator.estimate(engine, FunctionObjective(model.losses), *arguments)
        found.append(read_all(engine, estimate))
    estimates, inside = torch.stack(found), unpacked(estimator.masks["layer.weight"], 0, 48)
    d = int(inside.sum())
    assert innermost(estimator).perturbation.directions.dimension(engine, ["layer.weight"]) == d
    assert 6 <= d <= 18
    assert not estimates[:, ~inside].any()
    assert near((estimates - g * inside).pow(2).sum(dim=1) / (g * inside).pow(2).sum(), (d + 1) / q)
    assert near((estimates - g).pow(2).sum(dim=1), (g * inside).pow(2).sum() * (d + 1) / q + g[~inside].pow(2).sum())
    if by == "small_magnitude":
        w = model.layer.weight.detach().abs().flatten()
        assert d == 12
        assert w[inside].max() < w[~inside].min()


ORTHOGONAL = {"type": "dense", "distribution": "orthogonal"}


@pytest.mark.parametrize(
    "inner",
    [
        Align(type="align", learning_rate=1.0, pairs=12, perturbation=DENSE, wrappers=[mask()]),
        Spsa(type="spsa", learning_rate=1.0, pairs=12, perturbation=ORTHOGONAL, wrappers=[mask()]),
        ForwardGradient(
            type="forward_gradient", learning_rate=1.0, tangents=12, distribution="orthogonal", wrappers=[mask()]
        ),
    ],
    ids=lambda inner: inner.type,
)
def test_as_many_directions_as_the_mask_has_values_give_the_gradient_inside_it(inner):
    model = LinearLoss(6, 8)
    model.layer.weight.data = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    engine, estimator = LocalEngine(model), build_estimator(inner)
    arguments = (FunctionObjective(model.losses), torch.eye(8)[None], ["layer.weight"], StepKey(0, 0, "a"))
    estimate, _ = estimator.estimate(engine, *arguments)
    inside = unpacked(estimator.masks["layer.weight"], 0, 48)
    assert inside.sum() == 12
    torch.testing.assert_close(read_all(engine, estimate), model.gradient.flatten() * inside, rtol=2e-3, atol=2e-3)


def document(wrapper: dict, schedule: dict | None = None, **options) -> dict:
    spsa = config(wrapper, learning_rate=0.05, pairs=2, **options).model_dump(mode="json")
    backprop = {"type": "backprop", "learning_rate": 0.01, "optimizer": "SGD"}
    estimators = {"spsa": spsa} | ({"backprop": backprop} if schedule else {})
    return {"estimators": estimators, "schedule": schedule or {"type": "single", "estimator": "spsa"}}


def test_only_the_masks_weights_are_perturbed_and_moved_and_the_mask_outlasts_their_change():
    hybrid, seen = HybridOptimizer(tiny_model(), token_losses, schedule=document(mask(refresh=3))), []
    parameters, batch = hybrid.engine.parameters, token_batch()

    def watched(model, batch):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return token_losses(model, batch)

    for number in range(2):
        start = {name: p.detach().clone() for name, p in parameters.items()}
        for _ in range(3):
            hybrid.step(batch)
        kept = hybrid.estimators["spsa"].masks
        for name, p in parameters.items():
            inside = unpacked(kept[name], 0, p.numel())
            border = start[name].abs().flatten().sort().values[max(1, round(0.25 * p.numel())) - 1]
            assert torch.equal(inside, start[name].abs().flatten() <= border), (number, name)
            moved = (p != start[name]).flatten()
            assert not moved[~inside].any(), name
            assert moved[inside].float().mean() > 0.95, name
    perturbation = hybrid.estimators["spsa"].inner.perturbation
    key = StepKey(0, 5, "spsa")
    ready = perturbation.ready(hybrid.engine, list(parameters), [key.fold(0)], key)
    inside = {name: unpacked(kept[name], 0, p.numel()).view(p.shape) for name, p in parameters.items()}
    for name, p in parameters.items():
        changed = ready._perturbed(p.data, type("M", (), {"key": key.fold(0), "sign": 1})(), name) != p
        assert torch.equal(changed & ~inside[name], torch.zeros_like(changed))
        assert changed[inside[name]].float().mean() > 0.95


@pytest.mark.parametrize("by", ["small_magnitude", "random"])
def test_a_resumed_run_goes_on_with_its_masks(by):
    hybrid, batch = HybridOptimizer(tiny_model(), token_losses, schedule=document(mask(by, refresh=3))), token_batch()
    for step in range(6):
        if step == 2:
            resumed = HybridOptimizer(tiny_model(), token_losses, schedule=document(mask(by, refresh=3)))
            resumed.load_state_dict(hybrid.state_dict())
        hybrid.step(batch)
    for _ in range(4):
        resumed.step(batch)
    for name, p in hybrid.engine.parameters.items():
        assert torch.equal(p, resumed.engine.parameters[name]), name


TURNS = {"type": "alternate", "pattern": {"spsa": 1, "backprop": 1}}


def test_sensitivity_takes_the_largest_gradients_and_before_there_is_one_a_random_mask():
    hybrid, batch = (
        HybridOptimizer(tiny_model(), token_losses, schedule=document(mask("sensitivity", 0.1, 2), TURNS)),
        token_batch(),
    )
    spsa, parameters = hybrid.estimators["spsa"], hybrid.engine.parameters
    hybrid.step(batch)
    first = dict(spsa.masks)
    assert sum(map(size_of, first.values())) / sum(p.numel() for p in parameters.values()) == pytest.approx(
        0.1, rel=0.2
    )
    token_losses(hybrid.engine.model, batch).mean().backward()  # what backprop is about to take
    gradients = {name: p.grad.clone().flatten() for name, p in parameters.items()}
    hybrid.engine.model.zero_grad(set_to_none=True)
    hybrid.step(batch)
    resumed = HybridOptimizer(tiny_model(), token_losses, schedule=document(mask("sensitivity", 0.1, 2), TURNS))
    resumed.load_state_dict(hybrid.state_dict())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for one in (hybrid, resumed):
        one.step(batch)
    for name, p in parameters.items():
        size, inside = gradients[name].abs(), unpacked(spsa.masks[name], 0, p.numel())
        border = size.sort(descending=True).values[max(1, round(0.1 * p.numel())) - 1]
        clear = (size - border).abs() > 1e-5 * border  # its rounding decides about the others
        assert torch.equal(inside[clear], ((size > border) & (size > 0))[clear]), name
        assert not (p != before[name]).flatten()[~inside].any()
        assert torch.equal(p, resumed.engine.parameters[name]), name


def test_an_estimate_that_is_blended_with_backprop_keeps_the_mask_that_it_was_made_with():
    blend = {"type": "blend", "weights": {"spsa": 1.0, "backprop": 0.001}}
    hybrid, batch = (
        HybridOptimizer(tiny_model(), token_losses, schedule=document(mask("sensitivity", 0.1, 1), blend)),
        token_batch(),
    )
    hybrid.step(batch)
    spsa = hybrid.estimators["spsa"]
    coming = dict(spsa.coming)
    assert any(not torch.equal(coming[name], spsa.masks[name]) for name in coming)
    hybrid.step(batch)
    assert all(torch.equal(coming[name], spsa.masks[name]) for name in coming)
    assert any(not torch.equal(coming[name], spsa.coming[name]) for name in coming)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1)])
def test_wrappers_go_around_it_in_any_order(order):
    parts = (mask("random"), CAP, SUBSET, {"type": "relative_sigma"})
    engine = LocalEngine(tiny_model())
    arguments = (engine, FunctionObjective(token_losses), token_batch(), list(engine.parameters), StepKey(0, 3, "spsa"))
    estimate, cost = build_estimator(config(*(parts[i] for i in order))).estimate(*arguments)
    plain, _ = build_estimator(config(mask("random"), SUBSET, parts[3])).estimate(*arguments)
    whole = read_all(engine, plain)
    assert (whole != 0).float().mean() < 0.25
    assert cost.statistics["estimate_norm"] == pytest.approx(whole.norm().item(), rel=1e-5)
    assert torch.allclose(read_all(engine, estimate), whole * 0.1 / whole.norm(), rtol=1e-4)


@pytest.mark.parametrize(("by", "times"), [("random", 1), ("small_magnitude", 1), ("sensitivity", 2)])
def test_kept_memory_is_that_of_the_masks(by, times):
    schedule = TURNS if by == "sensitivity" else None
    hybrid = HybridOptimizer(tiny_model(), token_losses, schedule=document(mask(by), schedule))
    for _ in range(3):
        hybrid.step(token_batch())
    shapes = {name: tuple(p.shape) for name, p in hybrid.engine.parameters.items()}
    kept = hybrid.estimators["spsa"]
    told = hybrid.config.estimators["spsa"].keeps(shapes)["sparse_mask"]
    assert told == sum(bits.nbytes for bits in (*kept.masks.values(), *kept.coming.values()))
    assert told == times * sum(-(-p.numel() // 8) for p in hybrid.engine.parameters.values())


def test_what_has_no_dense_noise_or_no_gradient_is_refused():
    with pytest.raises(
        ValidationError,
        match=r"low_rank noise of which single values are picked is low rank no more; write perturbation: \{type: dense\}",
    ):
        config(mask(), perturbation={"type": "low_rank"})
    with pytest.raises(ValidationError, match="lazy_subspace noise of which"):
        EvolutionStrategy(type="es", learning_rate=1.0, perturbation={"type": "lazy_subspace"}, wrappers=[mask()])
    with pytest.raises(ValidationError, match=r"sparse_mask does not suit stale_gradient: it draws no noise"):
        StaleGradient(type="stale_gradient", learning_rate=1.0, wrappers=[mask()])
    with pytest.raises(ValidationError, match="keep"):
        config(mask(keep=0.0))
    with pytest.raises(
        UserError, match=r"'spsa': sparse_mask uses gradients of a backprop estimator again, but none acts"
    ):
        load_schedule(document(mask("sensitivity")))
