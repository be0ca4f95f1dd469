"""ES estimates against closed forms, an explicit SPSA loop, and the promise to leave the weights alone."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM

from hybrid_opt import HybridOptimizer
from hybrid_opt.config import load_run
from hybrid_opt.config.probing import EvolutionStrategy
from hybrid_opt.engines.contract import Shard
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.es import EsEstimator
from hybrid_opt.noise.drawing import gaussian
from hybrid_opt.noise.keys import Key
from hybrid_opt.objectives.contract import FunctionObjective
from tests.conftest import GLASS, tiny_model, token_batch, token_losses
from tests.estimators.losses import errors_and_cosines, quadratic, read_all

DENSE = {"type": "dense", "distribution": "gaussian"}


def build(**options) -> EsEstimator:
    settings = {"type": "es", "learning_rate": 1.0, "sigma": 1.0, "fitness_shaping": "none", "perturbation": DENSE}
    return EsEstimator(EvolutionStrategy(**{**settings, **options}))


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


# ---------------------------------------------------------------- which examples a member sees

FORMS = pytest.mark.parametrize("perturbation", [DENSE, {"type": "low_rank"}], ids=["dense", "low_rank"])


class Recorded:
    """An objective that notes the numbers of the examples that it is asked for, forward pass by forward pass."""

    def __init__(self, losses):
        self.losses_of, self.differentiable, self.numbers = losses, True, []

    def losses(self, model, batch):
        self.numbers.append(batch["number"])
        return self.losses_of(model, {name: tensor for name, tensor in batch.items() if name != "number"})


def regression(examples: int) -> tuple[nn.Module, Recorded, dict]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(examples, 5, generator=generator), torch.randn(examples, 3, generator=generator)
    torch.manual_seed(0)
    objective = Recorded(lambda model, batch: (model(batch["x"]) - batch["y"]).pow(2).sum(1))
    return nn.Linear(5, 3), objective, {"x": x, "y": y, "number": torch.arange(examples)}


def estimate_and_numbers(estimator, engine, objective, batch, key):
    """An estimate, its cost, and the numbers of the examples of each member, (members, k)."""
    names = list(engine.parameters)
    estimator.estimate(engine, objective, batch, names, Key(("rehearsed before",)))
    objective.numbers.clear()
    estimate, cost = estimator.estimate(engine, objective, batch, names, key)
    return estimate, cost, torch.cat(objective.numbers).view(estimator.config.population_size, -1)


@torch.no_grad()
def explicit_estimate(estimator, engine, objective, batch, key, numbers) -> dict[str, torch.Tensor]:
    """The estimate by written weights, one member after the other; pairs of antithetic members."""
    sigma, n = estimator.config.sigma, estimator.config.population_size
    before = {name: p.clone() for name, p in engine.parameters.items()}
    noise, losses = [], torch.zeros(n, dtype=torch.float64)
    for pair in range(n // 2):
        directions = {}
        for shard in engine.shards(before):
            directions[shard.name] = torch.zeros_like(shard.data)
            estimator.perturbation.add_noise([key.fold(pair)], torch.ones(1), shard, directions[shard.name])
        for member, sign in ((2 * pair, 1), (2 * pair + 1, -1)):
            for name, p in engine.parameters.items():
                p.copy_(before[name] + sign * sigma * directions[name].view_as(p))
            seen = {name: tensor[numbers[member]] for name, tensor in batch.items()}
            losses[member] = objective.losses(engine.model, seen).mean().item()
        noise.append(directions)
    for name, p in engine.parameters.items():
        p.copy_(before[name])
    if estimator.config.fitness_shaping == "standardize":
        losses = (losses - losses.mean()) / losses.std(correction=0)
    return {
        name: sum((losses[2 * i] - losses[2 * i + 1]) / (n * sigma) * noise[i][name] for i in range(n // 2))
        for name in before
    }


@FORMS
@pytest.mark.parametrize("fitness_shaping", ["none", "standardize"])
@pytest.mark.parametrize(
    ("options", "each", "different"),
    [
        ({}, 13, 13),
        ({"examples_per_step": 4}, 4, 4),
        ({"distinct_examples": True}, 4, 12),  # an even share of 13 for three pairs
        ({"distinct_examples": True, "examples_per_step": 2}, 2, 6),
    ],
)
def test_estimate_is_that_of_the_examples_drawn(perturbation, fitness_shaping, options, each, different):
    model, objective, batch = regression(13)
    engine = LocalEngine(model)
    estimator = build(
        population_size=6, sigma=0.1, perturbation=perturbation, fitness_shaping=fitness_shaping, **options
    )
    estimate, _, numbers = estimate_and_numbers(estimator, engine, objective, batch, key := Key((7,)))
    assert numbers.shape == (6, each)
    assert torch.equal(numbers[::2], numbers[1::2])
    assert len(numbers.unique()) == different
    assert all(len(row.unique()) == each for row in numbers)
    explicit = explicit_estimate(estimator, engine, objective, batch, key, numbers)
    for shard in engine.shards(engine.parameters):
        assert torch.allclose(estimate.read(shard), explicit[shard.name].float(), rtol=1e-4, atol=1e-4), shard.name
        assert estimate.read(shard).abs().max() > 0.1


@pytest.mark.parametrize("options", [{"examples_per_step": 4}, {"distinct_examples": True}])
def test_each_step_draws_its_own_examples_and_all_of_them_come_up(options):
    model, objective, batch = regression(13)
    engine, estimator = LocalEngine(model), build(population_size=6, sigma=0.1, **options)
    drawn = [estimate_and_numbers(estimator, engine, objective, batch, Key((i % 40,)))[2] for i in range(41)]
    assert torch.equal(drawn[0], drawn[40])
    assert len({tuple(numbers[0].tolist()) for numbers in drawn[:40]}) > 35
    # One member's four of 13 examples, 40 times: each is drawn 12.3 times, with a standard deviation of 2.9.
    counts = torch.bincount(torch.cat([numbers[0] for numbers in drawn[:40]]), minlength=13)
    assert counts.sum() == 160
    assert 2 <= counts.min() <= counts.max() <= 24


@FORMS
@pytest.mark.parametrize("options", [{}, {"distinct_examples": True, "examples_per_step": 3}])
def test_micro_batches_do_not_change_the_estimate(perturbation, options):
    model, objective, batch = regression(9)
    engine, key, read = LocalEngine(model), Key((3,)), {}
    for micro_batch_size in (None, 1, 2):
        estimator = build(
            population_size=6, sigma=0.1, perturbation=perturbation, micro_batch_size=micro_batch_size, **options
        )
        estimator.estimate(engine, objective, batch, list(engine.parameters), Key(("rehearsed before",)))
        objective.numbers.clear()
        estimate, _ = estimator.estimate(engine, objective, batch, list(engine.parameters), key)
        together = 6 if perturbation["type"] == "low_rank" else 1
        assert max(map(len, objective.numbers)) <= together * (micro_batch_size or 9)
        assert len(torch.cat(objective.numbers)) == 6 * options.get("examples_per_step", 9)
        read[micro_batch_size] = read_all(engine, estimate)
    for micro_batch_size in (1, 2):
        assert torch.allclose(read[micro_batch_size], read[None], rtol=1e-5, atol=1e-5)


@FORMS
@pytest.mark.parametrize("options", [{}, {"examples_per_step": 2}, {"distinct_examples": True, "micro_batch_size": 1}])
def test_tokens_are_those_that_were_processed_without_padding(perturbation, options):
    engine, lengths = LocalEngine(tiny_model()), torch.tensor([7, 6, 5, 4, 3, 2, 7])
    batch = {
        **token_batch(7),
        "attention_mask": (torch.arange(7) < lengths[:, None]).long(),
        "number": torch.arange(7),
    }
    estimator = build(population_size=6, sigma=0.01, perturbation=perturbation, **options)
    objective = Recorded(token_losses)
    names = list(engine.parameters)
    estimator.estimate(engine, objective, batch, names, Key(("rehearsed before",)))
    objective.numbers.clear()
    _, cost = estimator.estimate(engine, objective, batch, names, Key((0,)))
    assert cost.tokens == lengths[torch.cat(objective.numbers)].sum()
    assert cost.forwards == 6


def test_cost_tells_the_losses_of_the_examples_drawn():
    model, objective, batch = regression(13)
    engine, estimator = LocalEngine(model), build(population_size=6, sigma=1e-4, distinct_examples=True)
    _, cost, numbers = estimate_and_numbers(estimator, engine, objective, batch, Key((0,)))
    losses = objective.losses(model, batch)[numbers].mean(1)
    assert cost.loss == pytest.approx(losses.mean().item(), rel=1e-3)
    assert cost.loss_spread == pytest.approx(losses.std(correction=0).item(), rel=1e-2)


@pytest.mark.parametrize(
    ("options", "examples", "message"),
    [
        (
            {"examples_per_step": 5},
            4,
            r"needs 5 different examples, but its batch has 4; raise batch_size, or lower ex",
        ),
        ({"distinct_examples": True}, 2, r"needs 3 different examples, but its batch has 2; .* lower population_size"),
        ({"distinct_examples": True, "examples_per_step": 2}, 5, r"needs 6 different examples, but its batch has 5"),
        ({"examples_per_step": 1}, None, "need a batch with tensors"),
        ({"distinct_examples": True}, None, "need a batch with tensors"),
    ],
)
def test_too_few_examples_are_refused(options, examples, message):
    model, objective, batch = regression(examples or 1)
    batch = ["a", "b", "c", "d", "e", "f"] if examples is None else batch
    with pytest.raises(UserError, match=message):
        build(population_size=6, **options).estimate(LocalEngine(model), objective, batch, ["weight"], Key((0,)))
    assert objective.numbers == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distinct_examples": True, "antithetic": False}, "needs antithetic: true"),
        ({"distinct_examples": True, "fitness_shaping": "centered_rank"}, "write fitness_shaping: none or standardize"),
        ({"examples_per_step": 0}, "greater than or equal to 1"),
        ({"micro_batch_size": 0}, "greater than or equal to 1"),
        ({"members_per_forward": "all"}, "'auto'"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValidationError, match=message):
        build(population_size=6, **options)


@pytest.mark.parametrize(
    ("options", "needed"),
    [({"examples_per_step": 5}, 5), ({"distinct_examples": True}, 8),
     ({"distinct_examples": True, "examples_per_step": 2}, 16)],
)  # fmt: skip
def test_a_run_whose_batches_are_too_small_is_refused(write_run, options, needed):
    es = {"type": "es", "learning_rate": 0.1, "population_size": 16, **options}
    path = write_run(
        schedule={"estimators": {"mine": es}, "schedule": {"type": "single", "estimator": "mine"}},
        training={"steps": 1, "batch_size": needed - 1},
    )
    message = f"estimator 'mine' needs {needed} different examples a step, but training.batch_size is {needed - 1}"
    with pytest.raises(UserError, match=message):
        load_run(path)
    assert load_run(path, [f"training.batch_size={needed}"]).training.batch_size == needed


def test_a_step_of_a_run_with_distinct_examples_is_the_explicit_update():
    model = AutoModelForCausalLM.from_pretrained(GLASS).eval()
    batch = {**token_batch(10, 12, 1024), "number": torch.arange(10)}
    objective, rate = Recorded(token_losses), 1e-3
    es = {"type": "es", "learning_rate": rate, "population_size": 6, "sigma": 0.01, "distinct_examples": True}
    plan = {"estimators": {"mine": es}, "schedule": {"type": "single", "estimator": "mine"}}
    hybrid = HybridOptimizer(model, objective, schedule=plan, seed=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = hybrid.step(batch)
    numbers = torch.cat(objective.numbers)[-6 * 3 :].view(6, 3)  # what comes before are rehearsals
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(before, strict=False)
    key, estimator = Key((4, 0)).fold("mine"), hybrid.estimators["mine"]
    explicit = explicit_estimate(estimator, hybrid.engine, objective, batch, key, numbers)
    assert len(numbers.unique()) == 9
    assert report.tokens == 6 * 3 * 12
    moved, expected = (
        torch.cat([change[name].flatten() for name in before])
        for change in (
            {name: after[name] - before[name] for name in before},
            {name: -rate * explicit[name] for name in before},
        )
    )
    assert (moved - expected).norm() < 1e-3 * expected.norm()
