"""ES estimates against closed forms, an explicit SPSA loop, and the promise to leave the weights alone."""

import math

import pytest
import torch
from torch import nn

from hybrid_opt.config.schedule import EvolutionStrategy
from hybrid_opt.engines.contract import Shard
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.es import EsEstimator
from hybrid_opt.estimators.noise import Key, gaussian
from hybrid_opt.objectives.contract import FunctionObjective
from tests.conftest import tiny_model, token_batch, token_losses

DENSE = {"type": "dense", "distribution": "gaussian"}


def build(**options) -> EsEstimator:
    settings = {"type": "es", "learning_rate": 1.0, "sigma": 1.0, "fitness_shaping": "none", "perturbation": DENSE}
    return EsEstimator(EvolutionStrategy(**{**settings, **options}))


class LinearLoss(nn.Module):
    """`L(W) = <G, W>` for a matrix W (m, n) that only ever appears in a linear layer, as low rank needs it."""

    def __init__(self, m: int, n: int):
        super().__init__()
        self.layer = nn.Linear(n, m, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.gradient = torch.randn(m, n, generator=torch.Generator().manual_seed(5))

    def losses(self, model, batch):
        return (model.layer(batch) * self.gradient.T).sum((1, 2))


def read_all(engine: LocalEngine, estimate) -> torch.Tensor:
    return torch.cat([estimate.read(shard) for shard in engine.shards(engine.parameters)])


def errors_and_cosines(estimator: EsEstimator, m: int, n: int, repeats: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`|estimate - g|^2 / |g|^2` and the cosine with g, for many independent estimates."""
    model = LinearLoss(m, n)
    engine, objective = LocalEngine(model), FunctionObjective(model.losses)
    g = model.gradient.flatten()
    estimates = torch.stack(
        [
            read_all(engine, estimator.estimate(engine, objective, torch.eye(n)[None], ["layer.weight"], Key((i,)))[0])
            for i in range(repeats)
        ]
    )
    errors = (estimates - g).pow(2).sum(1) / g.pow(2).sum()
    return errors, torch.nn.functional.cosine_similarity(estimates, g[None])


RADEMACHER = {"type": "dense", "distribution": "rademacher"}
RANK_1, RANK_4 = ({"type": "low_rank", "noise_rank": r} for r in (1, 4))


@pytest.mark.parametrize(
    ("perturbation", "m", "n", "q", "expected"),
    [
        (DENSE, 2, 3, 1, 6 + 1),
        (DENSE, 6, 8, 8, (48 + 1) / 8),
        (RADEMACHER, 2, 3, 1, 6 - 1),
        (RADEMACHER, 6, 8, 8, (48 - 1) / 8),
        (RANK_1, 6, 8, 8, (48 + 1 + 2 * (6 + 8 + 1)) / 8),
        (RANK_4, 3, 4, 4, (12 + 1 + 2 * (3 + 4 + 1) / 4) / 4),
    ],
)
def test_mean_square_error_matches_its_closed_form(perturbation, m, n, q, expected):
    errors, _ = errors_and_cosines(build(population_size=2 * q, perturbation=perturbation), m, n, 400)
    standard_error = errors.std().item() / math.sqrt(len(errors))
    assert abs(errors.mean().item() - expected) < 4 * standard_error
    assert standard_error < 0.1 * expected  # narrow enough to tell the three formulas apart


@pytest.mark.parametrize("q", [8, 32])
def test_cosine_with_the_gradient(q):
    _, cosines = errors_and_cosines(build(population_size=2 * q), 20, 20, 100)
    standard_error = cosines.std().item() / math.sqrt(len(cosines))
    assert abs(cosines.mean().item() - 1 / math.sqrt(1 + 400 / q)) < 4 * standard_error
    assert standard_error < 0.008


def quadratic():
    model = nn.Linear(5, 3)
    x, y = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2))

    def losses(model, batch):
        return (model(batch["x"]) - batch["y"][:, :3]).pow(2).sum(1)

    return model, FunctionObjective(losses), {"x": x, "y": y}


def test_antithetic_without_shaping_is_n_spsa():
    model, objective, batch = quadratic()
    engine, sigma, q = LocalEngine(model), 0.01, 3
    estimate, cost = build(population_size=2 * q, sigma=sigma).estimate(
        engine, objective, batch, ["weight", "bias"], key := Key((7,))
    )
    explicit = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in model.named_parameters()}
    mean_losses = []
    for j in range(q):
        noise = {
            n: gaussian([key.fold(j, n)], 0, p.numel(), torch.device("cpu"))[0] for n, p in model.named_parameters()
        }
        side = {}
        for sign in (1, -1):
            weights = {n: (p + sign * sigma * noise[n].view_as(p)).detach() for n, p in model.named_parameters()}
            out = batch["x"] @ weights["weight"].T + weights["bias"]
            side[sign] = (out - batch["y"][:, :3]).pow(2).sum(1).mean().item()
        mean_losses += side.values()
        for name in explicit:
            explicit[name] += (side[1] - side[-1]) / (2 * q * sigma) * noise[name]
    for shard in engine.shards(["weight", "bias"]):
        assert torch.allclose(estimate.read(shard).double(), explicit[shard.name], rtol=1e-3, atol=1e-4)
    assert cost.loss == pytest.approx(sum(mean_losses) / len(mean_losses), rel=1e-5)
    assert (cost.forwards, cost.backwards) == (2 * q, 0)


def test_divide_by_sigma_false_is_sigma_times_the_gradient_estimate():
    model, objective, batch = quadratic()
    engine = LocalEngine(model)
    arguments = (engine, objective, batch, ["weight", "bias"], Key((1,)))
    options = {"population_size": 6, "sigma": 0.05, "fitness_shaping": "standardize"}
    divided, _ = build(**options).estimate(*arguments)
    plain, _ = build(**options, divide_by_sigma=False).estimate(*arguments)
    assert torch.allclose(read_all(engine, divided) * 0.05, read_all(engine, plain), rtol=1e-4)


def test_estimate_of_some_parameters_ignores_the_others():
    model, objective, batch = quadratic()
    engine = LocalEngine(model)
    alone, _ = build(population_size=4, sigma=0.01).estimate(engine, objective, batch, ["bias"], Key((1,)))
    model.weight.requires_grad_(False)
    frozen, _ = build(population_size=4, sigma=0.01).estimate(LocalEngine(model), objective, batch, ["bias"], Key((1,)))
    bias = Shard("bias", torch.zeros(3), 0, torch.Size([3]))
    assert torch.equal(alone.read(bias), frozen.read(bias))


def test_noise_does_not_depend_on_the_order_of_modules():
    """Two models of the same named layers, registered in opposite orders, get the same estimate."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))

    def losses(model, batch):
        return (model["b"](torch.tanh(model["a"](batch)))).pow(2).sum(1)

    def estimates(order):
        torch.manual_seed(0)
        layers = {"a": nn.Linear(5, 5), "b": nn.Linear(5, 5)}
        model = nn.ModuleDict({name: layers[name] for name in order})
        engine = LocalEngine(model)
        estimate, _ = build(population_size=4, sigma=0.01).estimate(
            engine, FunctionObjective(losses), x, list(engine.parameters), Key((0,))
        )
        return {shard.name: estimate.read(shard) for shard in engine.shards(engine.parameters)}

    forwards, backwards = estimates("ab"), estimates("ba")
    assert list(forwards) != list(backwards)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)
    assert not torch.equal(forwards["a.weight"], forwards["b.weight"])


@pytest.mark.parametrize("perturbation", [DENSE, {"type": "low_rank"}], ids=["dense", "low_rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_bitwise_what_they_were(perturbation, dtype):
    model = tiny_model().to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine, estimator = LocalEngine(model), build(population_size=4, sigma=0.1, perturbation=perturbation)
    for step in range(25):  # 100 members
        estimator.estimate(engine, FunctionObjective(token_losses), token_batch(), list(before), Key((step,)))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("perturbation", [DENSE, {"type": "low_rank"}], ids=["dense", "low_rank"])
def test_weights_and_modes_survive_an_objective_that_fails(perturbation):
    model = tiny_model()
    model.train()
    model.model.layers[0].eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]

    def fail(model, batch):
        token_losses(model, batch)
        raise RuntimeError("no reward today")

    with pytest.raises(RuntimeError, match="no reward"):
        build(population_size=4, perturbation=perturbation).estimate(
            LocalEngine(model), FunctionObjective(fail), token_batch(), list(before), Key((0,))
        )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    token_losses(model, token_batch())  # still a working model


def test_dropout_is_off_in_evaluation_and_on_again_after():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    seen = []

    def losses(model, batch):
        seen.append([module.training for module in model.modules()])
        return model(batch).sum(1)

    model.train()
    build(population_size=2).estimate(
        LocalEngine(model), FunctionObjective(losses), torch.ones(3, 4), ["0.weight"], Key((0,))
    )
    assert not any(mode for modes in seen for mode in modes)
    assert all(module.training for module in model.modules())


def test_losses_that_are_not_finite_are_refused():
    model, _, batch = quadratic()
    broken = FunctionObjective(lambda model, batch: model(batch["x"]).sum(1) * float("nan"))
    with pytest.raises(UserError, match="4 of 4 members is not finite; lower sigma"):
        build(population_size=4).estimate(LocalEngine(model), broken, batch, ["weight"], Key((0,)))
