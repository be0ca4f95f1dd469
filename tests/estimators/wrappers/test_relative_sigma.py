"""Sigma in proportion to the weights: what is evaluated, what is estimated, and that wrappers go around it in any order."""

import pytest
import torch
from pydantic import ValidationError

from hybrid_opt import HybridOptimizer
from hybrid_opt.config.estimators import StaleGradient
from hybrid_opt.config.probing import EvolutionStrategy, Spsa
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.estimators.build import build_estimator
from hybrid_opt.estimators.contract import innermost
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import FunctionObjective
from tests.conftest import tiny_model, token_batch, token_losses
from tests.estimators.losses import LinearLoss, errors_and_cosines, near, read_all

DENSE, LOW_RANK = {"type": "dense"}, {"type": "low_rank", "noise_rank": 2}
LAZY = {"type": "lazy_subspace", "noise_rank": 2, "refresh": 1}
RELATIVE, CAP = {"type": "relative_sigma"}, {"type": "norm_cap", "norm": 0.1}
SUBSET = {"type": "layer_subset", "layers": 2}


def config(perturbation: dict, *wrappers: dict, **options) -> Spsa:
    options = {"type": "spsa", "learning_rate": 1.0, "sigma": 0.01, **options}
    return Spsa(perturbation=perturbation, wrappers=wrappers, **options)


@pytest.mark.parametrize(
    ("perturbation", "expected"),
    [(DENSE, 49.0), (LOW_RANK, 49 + 15.0), (LAZY, 48 - 1 + 2 * 6 / 2)],
    ids=["dense", "low rank", "lazy"],
)
def test_estimates_of_a_linear_loss_are_as_good_as_with_one_sigma(perturbation, expected):
    errors, _ = errors_and_cosines(build_estimator(config(perturbation, {**RELATIVE, "floor": 0.3})), 6, 8, 800)
    assert near(errors, expected, resolution=0.12)


class TwoParts(torch.nn.Module):
    """A linear loss of two matrices, the second a hundred times as large as the first."""

    def __init__(self):
        super().__init__()
        self.small, self.large = (torch.nn.Linear(4, 3, bias=False) for _ in range(2))
        generator = torch.Generator().manual_seed(3)
        for layer, size in ((self.small, 0.02), (self.large, 2.0)):
            layer.weight.data = size * torch.randn(3, 4, generator=generator)
        self.gradient = torch.randn(6, 4, generator=generator)

    @staticmethod
    def losses(model, batch):
        rows = torch.cat([model.small(batch), model.large(batch)], dim=-1)
        return (rows * model.gradient.T).sum((1, 2))


@pytest.mark.parametrize("perturbation", [DENSE, LOW_RANK], ids=["dense", "low rank"])
def test_the_mean_is_the_gradient_though_parameters_differ_in_size(perturbation):
    model = TwoParts()
    engine, objective = LocalEngine(model), FunctionObjective(model.losses)
    estimator = build_estimator(config(perturbation, RELATIVE, pairs=100))
    names, kept = list(engine.parameters), []
    for step in range(80):
        estimate, _ = estimator.estimate(engine, objective, torch.eye(4)[None], names, StepKey(0, step, "spsa"))
        kept.append(read_all(engine, estimate))
    scales = innermost(estimator).perturbation.scales
    sizes = {name: p.detach().pow(2).mean().sqrt().item() for name, p in engine.parameters.items()}
    assert scales == pytest.approx(sizes, rel=1e-6)
    estimates, g = torch.stack(kept), model.gradient.flatten()
    # Slopes are mostly those along the large matrix, so the small one's part is known less well: to its own standard errors.
    for part in (slice(0, 12), slice(12, 24)):
        z = (estimates.mean(dim=0) - g)[part] / (estimates.std(dim=0) / 80**0.5)[part]
        assert z.pow(2).mean() < 2.5
    assert torch.nn.functional.cosine_similarity(estimates.mean(dim=0)[12:], g[12:], dim=0) > 0.95


@pytest.mark.parametrize("perturbation", [DENSE, LOW_RANK, {**LAZY}], ids=["dense", "low rank", "lazy"])
def test_what_is_evaluated_is_the_noise_times_each_parameters_size(perturbation):
    model, batch, seen = tiny_model(), token_batch(), []
    engine = LocalEngine(model)
    estimator = build_estimator(config(perturbation, {**RELATIVE, "floor": 0.05}, sigma=0.3, pairs=2))
    names, before = list(engine.parameters), {n: p.detach().clone() for n, p in engine.parameters.items()}
    key = StepKey(0, 3, "spsa")
    estimate, _ = estimator.estimate(engine, FunctionObjective(token_losses), batch, names, key)
    assert all(torch.equal(p, before[name]) for name, p in engine.parameters.items())
    unscaled = build_estimator(config(perturbation, sigma=0.3, pairs=2)).perturbation.ready(engine, names, [], key)
    for j, slope in zip(range(2), (2 * estimate.coefficients).tolist(), strict=True):
        for sign in (1, -1):
            for shard in engine.shards(names):
                s = max(before[shard.name].pow(2).mean().sqrt().item(), 0.05)
                unscaled.add_noise([key.fold(j)], torch.tensor([sign * 0.3 * s]), shard, shard.data)
            seen.append(token_losses(model, batch).mean().item())
            for name, p in engine.parameters.items():
                p.data.copy_(before[name])
        assert slope == pytest.approx((seen[-2] - seen[-1]) / (2 * 0.3), abs=2e-5)


@pytest.mark.parametrize("perturbation", [DENSE, LOW_RANK], ids=["dense", "low rank"])
def test_equal_sizes_are_one_larger_sigma(perturbation):
    """Where every s is the floor, the step is that of sigma times the floor."""
    changes = [({**RELATIVE, "floor": 10.0},), ()]
    found = []
    for wrappers, sigma in zip(changes, (0.001, 0.01), strict=True):
        engine = LocalEngine(tiny_model())
        estimator = build_estimator(config(perturbation, *wrappers, sigma=sigma, pairs=2))
        arguments = (FunctionObjective(token_losses), token_batch(), list(engine.parameters), StepKey(0, 3, "spsa"))
        found.append(read_all(engine, estimator.estimate(engine, *arguments)[0]))
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-4 * found[1].abs().max().item())


@pytest.mark.parametrize("perturbation", [DENSE, LOW_RANK], ids=["dense", "low rank"])
@pytest.mark.parametrize(
    "orders", [(RELATIVE, CAP, SUBSET), (CAP, RELATIVE, SUBSET), (SUBSET, CAP, RELATIVE), (SUBSET, RELATIVE, CAP)]
)
def test_wrappers_go_around_it_in_any_order(perturbation, orders):
    engine = LocalEngine(tiny_model())
    names, key = list(engine.parameters), StepKey(0, 3, "spsa")
    arguments = (engine, FunctionObjective(token_losses), token_batch(), names, key)
    estimate, cost = build_estimator(config(perturbation, *orders)).estimate(*arguments)
    plain, _ = build_estimator(config(perturbation, RELATIVE, SUBSET)).estimate(*arguments)
    whole = read_all(engine, plain)
    assert cost.statistics["estimate_norm"] == pytest.approx(whole.norm().item(), rel=1e-5)
    assert torch.allclose(read_all(engine, estimate), whole * 0.1 / whole.norm(), rtol=1e-4)


def document(refresh: int) -> dict:
    spsa = config(LOW_RANK, {**RELATIVE, "refresh": refresh}, sigma=0.1, learning_rate=0.5).model_dump(mode="json")
    return {"estimators": {"spsa": spsa}, "schedule": {"type": "single", "estimator": "spsa"}}


def test_sizes_are_kept_for_refresh_steps_and_a_resumed_run_goes_on_with_them():
    hybrid, kept, batch = HybridOptimizer(tiny_model(), token_losses, schedule=document(3)), [], token_batch()
    for step in range(6):
        if step == 2:
            resumed = HybridOptimizer(tiny_model(), token_losses, schedule=document(3))
            resumed.load_state_dict(hybrid.state_dict())
        hybrid.step(batch)
        kept.append(dict(hybrid.estimators["spsa"].scales))
    assert kept[0] == kept[1] == kept[2]
    assert kept[3] == kept[4] == kept[5]
    assert kept[2] != kept[3]
    for _ in range(4):
        resumed.step(batch)
    for name, p in hybrid.engine.parameters.items():
        assert torch.equal(p, resumed.engine.parameters[name]), name


def test_es_takes_it_too():
    options = {"type": "es", "learning_rate": 1.0, "sigma": 0.01, "population_size": 6, "perturbation": LOW_RANK}
    engine = LocalEngine(LinearLoss(6, 8))
    estimator = build_estimator(EvolutionStrategy(wrappers=[{**RELATIVE, "floor": 0.5}], **options))
    objective, key = FunctionObjective(engine.model.losses), StepKey(0, 1, "es")
    estimate, _ = estimator.estimate(engine, objective, torch.eye(8)[None], ["layer.weight"], key)
    plain, _ = build_estimator(EvolutionStrategy(**options)).estimate(
        engine, objective, torch.eye(8)[None], ["layer.weight"], key
    )
    assert torch.allclose(
        read_all(engine, estimate), 2 * read_all(engine, plain), rtol=1e-4
    )  # standardized: 1 / s stays


def test_an_estimator_without_noise_is_refused():
    with pytest.raises(ValidationError, match=r"relative_sigma does not suit stale_gradient: it draws no noise"):
        StaleGradient(type="stale_gradient", learning_rate=1.0, wrappers=[RELATIVE])
    with pytest.raises(ValidationError, match="relative_sigma is there twice"):
        config(DENSE, RELATIVE, RELATIVE)
