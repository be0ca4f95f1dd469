"""How contributions become changes of the weights."""

import copy
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from torch import nn

from hybrid_opt.config.estimators import Backprop, TorchOptimizerName
from hybrid_opt.config.steps import AdamRule, MomentumRule, SgdRule
from hybrid_opt.engines.contract import Contribution, Shard
from hybrid_opt.engines.local import Gradients, LocalEngine
from hybrid_opt.engines.update_rules import build_rule
from hybrid_opt.errors import UserError


@dataclass
class Given:
    """An Estimate with one value everywhere, or with one for each element."""

    value: float | torch.Tensor

    def read(self, shard):
        return torch.as_tensor(self.value, dtype=torch.float32).expand(shard.data.numel()).clone()

    def add_to(self, out, shard, factor):
        out.add_(self.read(shard), alpha=factor)


def two_layers(dtype=torch.float32) -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)}).to(dtype)
    for p in model.parameters():
        nn.init.ones_(p)
    return model


def gradient(value, names=("a.weight",), weight=1.0, rate=0.1):
    return Contribution(Given(value), weight, names, rate, None)


def direct(value, names=("a.weight", "b.weight"), weight=1.0, rate=0.1, rule=None):
    return Contribution(Given(value), weight, names, rate, rule or build_rule(SgdRule(type="sgd")))


def engine_with(
    optimizer="SGD", names=("a.weight",), model=None, master_weights="fp32", seed=0, **options
) -> LocalEngine:
    config = Backprop(type="backprop", optimizer=optimizer, learning_rate=1.0, **options)
    return LocalEngine(model or two_layers(), config, names, master_weights=master_weights, seed=seed)


def weights(engine, name):
    return engine.parameters[name].unique().tolist()


def test_without_a_gradient_each_rule_moves_its_own():
    engine = LocalEngine(two_layers())
    engine.apply([direct(2.0, weight=0.5), direct(1.0, names=["b.weight"])], 0)
    assert weights(engine, "a.weight") == [pytest.approx(0.9)]
    assert weights(engine, "b.weight") == [pytest.approx(0.8)]


def test_where_both_own_a_parameter_the_optimizer_sees_the_weighted_sum():
    engine = engine_with()
    engine.apply([direct(10.0, weight=0.1, rate=99.0, names=["a.weight"]), gradient(2.0, weight=0.5)], 0)
    assert weights(engine, "a.weight") == [pytest.approx(1 - 0.1 * (0.1 * 10 + 0.5 * 2))]
    assert weights(engine, "b.weight") == [1.0]


def test_what_the_gradient_does_not_own_is_moved_directly_in_the_same_step():
    engine = engine_with()
    engine.apply([gradient(1.0, rate=0.5), direct(1.0, rate=0.25)], 0)
    assert weights(engine, "a.weight") == [pytest.approx(1 - 0.5 * (1 + 1))]
    assert weights(engine, "b.weight") == [0.75]


def test_clipping_is_of_the_whole_sum():
    engine = engine_with(gradient_clipping=1.0)
    engine.apply([gradient(3.0), direct(2.0, names=["a.weight"])], 0)  # four values of 5: norm 10
    assert weights(engine, "a.weight") == [pytest.approx(1 - 0.1 * 0.5, abs=1e-6)]


def test_direct_steps_leave_the_optimizers_moments_alone():
    engine = engine_with("Adam")
    engine.apply([gradient(1.0)], 0)
    before = {k: v.clone() for k, v in engine.optimizer.state[engine.masters["a.weight"]].items()}
    engine.apply([direct(5.0)], 0)
    after = engine.optimizer.state[engine.masters["a.weight"]]
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_rules_keep_their_state_apart():
    rule = build_rule(MomentumRule(type="momentum", beta=0.5))
    engine = LocalEngine(two_layers())
    for step, value in enumerate((1.0, 0.0)):
        engine.apply([direct(value, rule=rule)], step)
    assert weights(engine, "a.weight") == [pytest.approx(1 - 0.1 * (1 + 0.5))]


def test_small_updates_of_bfloat16_weights_add_up_in_the_master():
    kept, lost = LocalEngine(two_layers(torch.bfloat16)), LocalEngine(two_layers(torch.bfloat16), master_weights="none")
    for step in range(100):
        for engine in (kept, lost):
            engine.apply([direct(1e-3, rate=1.0)], step)
    assert kept.model["a"].weight.dtype == torch.bfloat16
    assert weights(kept, "a.weight") == [pytest.approx(0.9, abs=0.004)]
    assert weights(lost, "a.weight") == [1.0]


def test_gradients_of_bfloat16_weights_go_through_the_master_too():
    engine = engine_with("Adam", model=two_layers(torch.bfloat16))
    engine.apply([gradient(1.0, rate=1e-3)], 0)
    assert engine.masters["a.weight"].unique().tolist() == [pytest.approx(1 - 1e-3, abs=1e-6)]
    assert engine.optimizer.state[engine.masters["a.weight"]]["exp_avg"].dtype == torch.float32


def test_state_can_be_saved_and_put_back():
    def steps(engine, values):
        for step, value in enumerate(values):
            engine.apply([gradient(value)], step)

    whole, first, second = (engine_with("Adam") for _ in range(3))
    steps(whole, (1.0, -0.5, 0.25))
    steps(first, (1.0, -0.5))
    second.load_state_dict(first.state_dict())
    steps(second, (0.25,))
    assert torch.equal(whole.parameters["a.weight"], second.parameters["a.weight"])


def test_shards_cover_every_parameter_once_with_tied_ones_together():
    model = two_layers()
    model["b"].weight = model["a"].weight
    engine = LocalEngine(model)
    assert [(s.name, s.start, s.data.numel()) for s in engine.shards(engine.parameters)] == [("a.weight", 0, 4)]


# ---------------------------------------------------------------- bfloat16 weights without a float32 copy

WIDTH = 256
WEIGHTS = ("a.weight", "b.weight")
RULES = {
    "sgd": SgdRule(type="sgd"),
    "momentum": MomentumRule(type="momentum"),
    "adam": AdamRule(type="adam"),
}


def narrow_model() -> nn.Module:
    """Two layers of different sizes whose weights have the standard deviation 0.02."""
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH, bias=False), "b": nn.Linear(WIDTH, 3, bias=False)})
    for p in model.parameters():
        p.data = 0.02 * torch.randn(p.shape, generator=generator)
    return model.bfloat16()


def values(count: int, number: int) -> torch.Tensor:
    """What backprop gives for bfloat16 weights: values that bfloat16 represents."""
    return torch.randn(count, generator=torch.Generator().manual_seed(number)).bfloat16().float()


@pytest.mark.parametrize("kind", RULES)
def test_updates_by_rules_are_added_in_float32_and_rounded_to_nearest(kind):
    model, rule, reference = narrow_model(), build_rule(RULES[kind]), build_rule(RULES[kind])
    engine = LocalEngine(model, master_weights="none")
    for step in range(3):
        before = model["a"].weight.detach().float().view(-1)
        estimate = Given(torch.randn(len(before), generator=torch.Generator().manual_seed(step)))
        reference.update(Shard("a.weight", before, 0, (WIDTH, WIDTH)), estimate, 0.5, 0.01)
        engine.apply([Contribution(estimate, 0.5, ["a.weight"], 0.01, rule)], step)
        assert torch.equal(model["a"].weight.view(-1), before.bfloat16()), step


def test_the_optimizer_adds_in_float32_and_rounds_to_nearest():
    model = narrow_model()
    options = {"weight_decay": 0.1, "eps": 1e-6}
    engine = engine_with("AdamW", WEIGHTS, model, "none", optimizer_arguments=options)
    copies = {name: p.detach().float() for name, p in model.named_parameters()}
    reference = torch.optim.AdamW(copies.values(), lr=1e-3, **options)
    for step in range(3):
        for number, part in enumerate(copies.values()):
            part.grad = values(part.numel(), 10 * step + number).view(part.shape)
        estimate = Gradients({name: part.grad.clone() for name, part in copies.items()})
        reference.step()
        for part in copies.values():
            part.copy_(part.bfloat16())
        engine.apply([Contribution(estimate, 1.0, WEIGHTS, 1e-3, None)], step)
        assert all(torch.equal(p.float(), copies[name]) for name, p in model.named_parameters()), step


def test_two_rules_on_one_parameter_are_added_before_rounding():
    """bfloat16 lies 2^-7 apart above 1: neither of two changes of 0.4 of that is seen alone, their sum is."""
    engine = LocalEngine(two_layers(torch.bfloat16), master_weights="none")
    engine.apply([direct(-0.4 * 2**-7, rate=1.0), direct(-0.4 * 2**-7, rate=1.0, names=["a.weight"])], 0)
    assert weights(engine, "a.weight") == [1 + 2**-7]
    assert weights(engine, "b.weight") == [1.0]


@pytest.mark.parametrize(
    ("optimizer", "arguments", "expected"),
    [("SGD", {"momentum": 0.9}, 1 + 1.9 + 2.71), ("AdamW", {"weight_decay": 0.0, "eps": 1e-12}, 3.0)],
)
def test_stochastic_rounding_is_right_on_average_with_an_optimizer(optimizer, arguments, expected):
    """Three steps of one gradient, whose course does not depend on the weights."""
    model = narrow_model()
    engine = engine_with(optimizer, ["a.weight"], model, "stochastic_rounding", optimizer_arguments=arguments)
    before, rate = model["a"].weight.detach().double(), 1e-5
    for step in range(3):
        engine.apply([gradient(1.0, rate=rate)], step)
    errors = model["a"].weight.detach().double() - before + rate * expected
    standard_error = errors.std().item() / WIDTH
    assert abs(errors.mean().item()) < 4 * standard_error
    assert standard_error < 0.02 * rate * expected


@pytest.mark.parametrize("optimizer", get_args(TorchOptimizerName))
@pytest.mark.parametrize("master_weights", ["stochastic_rounding", "none"])
def test_moments_are_float32_and_a_resumed_run_goes_on_bitwise(optimizer, master_weights):
    def engine():
        return engine_with(optimizer, ["b.weight"], narrow_model(), master_weights)

    def steps(engine, numbers):
        for step in numbers:
            engine.apply([gradient(values(3 * WIDTH, step), names=["b.weight"], rate=1e-4)], step)
        moments = engine.optimizer.state[engine.masters["b.weight"]].values()
        assert {m.dtype for m in moments if isinstance(m, torch.Tensor)} <= {torch.float32}

    whole, first, second = engine(), engine(), engine()
    steps(whole, range(4))
    steps(first, range(2))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(second, range(2, 4))
    assert torch.equal(whole.parameters["b.weight"], second.parameters["b.weight"])
    assert not torch.equal(first.parameters["b.weight"], second.parameters["b.weight"])


def test_the_seed_decides_the_rounding():
    def after(seed):
        engine = LocalEngine(narrow_model(), master_weights="stochastic_rounding", seed=seed)
        engine.apply([direct(1e-5, rate=1.0)], 0)
        return engine.parameters["a.weight"].detach()

    assert torch.equal(after(0), after(0))
    assert not torch.equal(after(0), after(1))


@pytest.mark.parametrize("master_weights", ["fp32", "stochastic_rounding", "none"])
def test_clipping_counts_the_gradient_of_all_parameters(master_weights):
    """Four values of 4 and four of 3: norm 10. Each parameter alone would be clipped less."""
    engine = engine_with("SGD", WEIGHTS, two_layers(torch.bfloat16), master_weights, gradient_clipping=5.0)
    estimate = Gradients({"a.weight": torch.full((4,), 4.0), "b.weight": torch.full((4,), 3.0)})
    engine.apply([Contribution(estimate, 1.0, WEIGHTS, 0.125, None)], 0)
    assert weights(engine, "a.weight") == [pytest.approx(1 - 0.125 * 4 / 2, abs=1e-3)]
    assert weights(engine, "b.weight") == [pytest.approx(1 - 0.125 * 3 / 2, abs=1e-3)]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("master_weights", ["fp32", "stochastic_rounding", "none"])
def test_steps_write_to_the_weights_own_memory_and_leave_no_gradient(optimizer, master_weights):
    model = narrow_model()
    engine = engine_with(optimizer, ["a.weight"], model, master_weights)
    places, before = [p.data_ptr() for p in model.parameters()], [p.detach().clone() for p in model.parameters()]
    for step in range(2):
        engine.apply([gradient(1.0), direct(1.0, names=["b.weight"])], step)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.grad is None for p in [*model.parameters(), *engine.masters.values()])


def test_float32_parameters_of_a_mixed_model_are_not_rounded():
    model = narrow_model()
    model["b"].float()
    engine = engine_with("SGD", WEIGHTS, model, "stochastic_rounding")
    before = model["b"].weight.detach().clone()
    engine.apply([gradient(1.0, names=WEIGHTS, rate=1e-6)], 0)
    assert torch.equal(model["b"].weight, before - 1e-6)


def test_backward_passes_go_on_in_bfloat16_after_the_optimizer_saw_float32():
    model = narrow_model()
    engine = engine_with("AdamW", ["a.weight"], model, "stochastic_rounding")
    for step in range(2):
        model["a"](torch.ones(1, WIDTH, dtype=torch.bfloat16)).sum().backward()
        assert model["a"].weight.grad.dtype == torch.bfloat16
        engine.apply([gradient(1.0)], step)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LocalEngine(two_layers().requires_grad_(False)), "nothing to train"),
        (lambda: LocalEngine(two_layers(), device="nowhere"), "engine.device: 'nowhere' cannot be used"),
        (lambda: engine_with("SGD", optimizer_arguments={"momentun": 0.9}), "SGD does not take {'momentun': 0.9}"),
        (lambda: engine_with("SGD", optimizer_arguments={"momentum": -1}), "Invalid momentum"),
        (
            lambda: LocalEngine(two_layers(torch.float16), master_weights="stochastic_rounding"),
            "parameter a.weight is float16; write fp32, or load the model in bfloat16",
        ),
    ],
)
def test_mistakes(build, message):
    with pytest.raises(UserError, match=message):
        build()
