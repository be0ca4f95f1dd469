"""Directions on the sphere and orthogonal ones: lengths, angles, slices, and what they do for estimates."""

import math

import pytest
import torch

from hybrid_opt import HybridOptimizer
from hybrid_opt.config.probing import EvolutionStrategy, Spsa
from hybrid_opt.engines.contract import Shard
from hybrid_opt.engines.inner_products import inner_products
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.es import EsEstimator
from hybrid_opt.estimators.probing import NoiseSum
from hybrid_opt.estimators.spsa import SpsaEstimator
from hybrid_opt.noise.drawing import gaussian
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.perturbations.mixed_directions import directions_of
from tests.conftest import tiny_model, token_batch, token_losses
from tests.estimators.losses import errors_and_cosines, near, quadratic, read_all

CPU, KEY = torch.device("cpu"), StepKey(1, 2, "es")
KEYS = [KEY.fold(j) for j in range(5)]
KINDS = ["sphere", "orthogonal"]


def options(distribution: str, **others):
    dense = {"type": "dense", "distribution": distribution}
    return {"learning_rate": 1.0, "sigma": 1.0, "perturbation": dense, **others}


def step_directions(distribution: str):
    """The tiny model's engine, names of most of its parameters, the source for one step, and its directions (5, n)."""
    engine = LocalEngine(tiny_model())
    names = [name for name in engine.parameters if "norm" not in name]
    source = directions_of(distribution).ready(engine, names, KEYS, KEY)
    parts = [source.read(KEYS, name, 0, engine.parameters[name].numel(), CPU) for name in names]
    return engine, names, source, torch.cat(parts, dim=1)


@pytest.mark.parametrize(("distribution", "q", "expected"), [
    ("sphere", 1, 47), ("sphere", 8, 47 / 8), ("orthogonal", 1, 47), ("orthogonal", 8, 48 / 8 - 1), ("orthogonal", 24, 1),
])  # fmt: skip
def test_mean_square_error_matches_its_closed_form(distribution, q, expected):
    estimator = SpsaEstimator(Spsa(type="spsa", pairs=q, **options(distribution)))
    errors, _ = errors_and_cosines(estimator, 6, 8, 300 if q == 1 else 120)
    assert near(errors, expected, resolution=0.15)


def test_all_orthogonal_directions_give_the_gradient_itself():
    estimator = SpsaEstimator(Spsa(type="spsa", pairs=12, **options("orthogonal")))
    errors, _ = errors_and_cosines(estimator, 3, 4, 10)
    assert errors.max() < 1e-4


def test_lengths_are_exact_and_orthogonal_directions_are_orthogonal():
    for distribution in KINDS:
        engine, names, _, z = step_directions(distribution)
        n = sum(engine.parameters[name].numel() for name in names)
        gram = z.double() @ z.double().T / n
        assert gram.diagonal().tolist() == pytest.approx([1.0] * 5, abs=1e-6)
        off = (gram - torch.diag(gram.diagonal())).abs().max().item()
        assert off < 1e-6 if distribution == "orthogonal" else 1e-4 < off < 4 / math.sqrt(n)


def test_orthogonal_directions_are_the_qr_factor_of_the_gaussian_ones():
    engine, names, _, z = step_directions("orthogonal")
    parts = [gaussian([key.fold(name) for key in KEYS], 0, engine.parameters[name].numel(), CPU) for name in names]
    q, r = torch.linalg.qr(torch.cat(parts, dim=1).double().T)
    expected = (q * r.diagonal().sign()).T * math.sqrt(z.shape[1])
    assert torch.allclose(z.double(), expected, atol=1e-4)


@pytest.mark.parametrize("distribution", KINDS)
def test_any_slice_of_any_directions_is_that_of_the_whole_bitwise(distribution):
    engine, names, source, _ = step_directions(distribution)
    name = max(names, key=lambda n: engine.parameters[n].numel())
    whole = source.read(KEYS, name, 0, engine.parameters[name].numel(), CPU)
    for start, count in ((0, 7), (3, 1), (129, 1000)):
        for chosen in ([0, 1, 2, 3, 4], [3], [4, 1]):
            part = source.read([KEYS[i] for i in chosen], name, start, count, CPU)
            assert torch.equal(part, whole[chosen, start : start + count])


class Cut:
    """An engine whose shards are cut in two at an odd place, as ranks cut them."""

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def shards(self, names):
        for shard in self.engine.shards(names):
            middle = len(shard.data) // 3 + 1
            yield Shard(shard.name, shard.data[:middle], shard.start, shard.shape)
            if middle < len(shard.data):
                yield Shard(shard.name, shard.data[middle:], shard.start + middle, shard.shape)


@pytest.mark.parametrize("distribution", KINDS)
def test_how_weights_are_sharded_changes_nothing_but_rounding(distribution):
    engine, names, source, _ = step_directions(distribution)
    cut = directions_of(distribution).ready(Cut(engine), names, KEYS, KEY)
    assert torch.allclose(cut.matrix, source.matrix, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("distribution", KINDS)
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("backup", ["layer", "model"])
def test_members_are_evaluated_along_the_directions_that_the_estimate_is_made_of(distribution, antithetic, backup):
    model, objective, batch = quadratic()
    engine = LocalEngine(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    dense = {"type": "dense", "distribution": distribution, "backup": backup}
    settings = {"population_size": 6, "antithetic": antithetic, "fitness_shaping": "none", "sigma": 0.1}
    es = EsEstimator(EvolutionStrategy(type="es", learning_rate=1.0, perturbation=dense, **settings))
    estimate, _ = es.estimate(engine, objective, batch, ["weight", "bias"], KEY)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    together = 2 if antithetic else 1
    expected = torch.zeros(18)
    for key in estimate.keys:
        z = read_all(engine, NoiseSum(estimate.perturbation, [key], torch.ones(1)))
        assert z.norm().item() == pytest.approx(math.sqrt(18), rel=1e-5)
        for sign in (1, -1)[:together]:
            weight, bias = before["weight"] + 0.1 * sign * z[:15].view(3, 5), before["bias"] + 0.1 * sign * z[15:]
            loss = (batch["x"] @ weight.T + bias - batch["y"][:, :3]).pow(2).sum(1).mean()
            expected += sign * loss / (6 * 0.1) * z
    assert torch.allclose(read_all(engine, estimate), expected, rtol=1e-3, atol=1e-3)


def test_more_orthogonal_directions_than_values_are_refused():
    estimator = SpsaEstimator(Spsa(type="spsa", pairs=13, **options("orthogonal")))
    with pytest.raises(
        UserError, match=r"13 directions of a step are not linearly independent in the 12 values .* lower pairs"
    ):
        errors_and_cosines(estimator, 3, 4, 1)


def test_directions_are_those_of_the_parameters_that_a_step_moves():
    """With `layer_subset` the length is that of a block's values, not of the model's."""
    spsa = {"type": "spsa", **options("sphere", sigma=1e-3), "pairs": 2, "learning_rate": 1e-6}
    spsa["wrappers"] = [{"type": "layer_subset", "layers": 1}]
    hybrid = HybridOptimizer(
        tiny_model(),
        token_losses,
        schedule={"estimators": {"spsa": spsa}, "schedule": {"type": "single", "estimator": "spsa"}},
    )
    estimator, key = hybrid.estimators["spsa"], StepKey(0, 0, "spsa")
    estimate, _ = estimator.estimate(
        hybrid.engine, hybrid.objective, token_batch(), list(hybrid.engine.parameters), key
    )
    moved = sum(hybrid.engine.parameters[name].numel() for name in estimate.names)
    one = NoiseSum(estimate.estimate.perturbation, [key.fold(0)], torch.ones(1))
    squared = inner_products(hybrid.engine, estimate.names, [one]).item()
    assert squared == pytest.approx(moved, rel=1e-5)
    assert moved < sum(p.numel() for p in hybrid.engine.parameters.values())
    hybrid.step(token_batch())
