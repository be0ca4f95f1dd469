"""How contributions become changes of the weights."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hybrid_opt.config.schedule import Backprop, MomentumRule, SgdRule
from hybrid_opt.engines.contract import Contribution
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.engines.update_rules import build_rule
from hybrid_opt.errors import UserError


@dataclass
class Constant:
    """An Estimate with the same value everywhere."""

    value: float

    def read(self, shard):
        return torch.full((shard.data.numel(),), self.value)


def two_layers(dtype=torch.float32) -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)}).to(dtype)
    for p in model.parameters():
        nn.init.ones_(p)
    return model


def gradient(value, names=("a.weight",), weight=1.0, rate=0.1):
    return Contribution(Constant(value), weight, names, rate, None)


def direct(value, names=("a.weight", "b.weight"), weight=1.0, rate=0.1, rule=None):
    return Contribution(Constant(value), weight, names, rate, rule or build_rule(SgdRule(type="sgd")))


def engine_with(optimizer="SGD", names=("a.weight",), model=None, **options) -> LocalEngine:
    config = Backprop(type="backprop", optimizer=optimizer, learning_rate=1.0, **options)
    return LocalEngine(model or two_layers(), config, names)


def weights(engine, name):
    return engine.parameters[name].unique().tolist()


def test_without_a_gradient_each_rule_moves_its_own():
    engine = LocalEngine(two_layers())
    engine.apply([direct(2.0, weight=0.5), direct(1.0, names=["b.weight"])])
    assert weights(engine, "a.weight") == [pytest.approx(0.9)]
    assert weights(engine, "b.weight") == [pytest.approx(0.8)]


def test_where_both_own_a_parameter_the_optimizer_sees_the_weighted_sum():
    engine = engine_with()
    engine.apply([direct(10.0, weight=0.1, rate=99.0, names=["a.weight"]), gradient(2.0, weight=0.5)])
    assert weights(engine, "a.weight") == [pytest.approx(1 - 0.1 * (0.1 * 10 + 0.5 * 2))]
    assert weights(engine, "b.weight") == [1.0]


def test_what_the_gradient_does_not_own_is_moved_directly_in_the_same_step():
    engine = engine_with()
    engine.apply([gradient(1.0, rate=0.5), direct(1.0, rate=0.25)])
    assert weights(engine, "a.weight") == [pytest.approx(1 - 0.5 * (1 + 1))]
    assert weights(engine, "b.weight") == [0.75]


def test_clipping_is_of_the_whole_sum():
    engine = engine_with(gradient_clipping=1.0)
    engine.apply([gradient(3.0), direct(2.0, names=["a.weight"])])  # four values of 5: norm 10
    assert weights(engine, "a.weight") == [pytest.approx(1 - 0.1 * 0.5, abs=1e-6)]


def test_direct_steps_leave_the_optimizers_moments_alone():
    engine = engine_with("Adam")
    engine.apply([gradient(1.0)])
    before = {k: v.clone() for k, v in engine.optimizer.state[engine.masters["a.weight"]].items()}
    engine.apply([direct(5.0)])
    after = engine.optimizer.state[engine.masters["a.weight"]]
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_rules_keep_their_state_apart():
    rule = build_rule(MomentumRule(type="momentum", beta=0.5))
    engine = LocalEngine(two_layers())
    for value in (1.0, 0.0):
        engine.apply([direct(value, rule=rule)])
    assert weights(engine, "a.weight") == [pytest.approx(1 - 0.1 * (1 + 0.5))]


def test_small_updates_of_bfloat16_weights_add_up_in_the_master():
    kept, lost = LocalEngine(two_layers(torch.bfloat16)), LocalEngine(two_layers(torch.bfloat16), master_weights="none")
    for _ in range(100):
        for engine in (kept, lost):
            engine.apply([direct(1e-3, rate=1.0)])
    assert kept.model["a"].weight.dtype == torch.bfloat16
    assert weights(kept, "a.weight") == [pytest.approx(0.9, abs=0.004)]
    assert weights(lost, "a.weight") == [1.0]


def test_gradients_of_bfloat16_weights_go_through_the_master_too():
    engine = engine_with("Adam", model=two_layers(torch.bfloat16))
    engine.apply([gradient(1.0, rate=1e-3)])
    assert engine.masters["a.weight"].unique().tolist() == [pytest.approx(1 - 1e-3, abs=1e-6)]
    assert engine.optimizer.state[engine.masters["a.weight"]]["exp_avg"].dtype == torch.float32


def test_state_can_be_saved_and_put_back():
    def steps(engine, values):
        for value in values:
            engine.apply([gradient(value)])

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


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LocalEngine(two_layers().requires_grad_(False)), "nothing to train"),
        (lambda: LocalEngine(two_layers(), device="nowhere"), "engine.device: 'nowhere' cannot be used"),
        (lambda: engine_with("SGD", optimizer_arguments={"momentun": 0.9}), "SGD does not take {'momentun': 0.9}"),
        (lambda: engine_with("SGD", optimizer_arguments={"momentum": -1}), "Invalid momentum"),
    ],
)
def test_mistakes(build, message):
    with pytest.raises(UserError, match=message):
        build()
