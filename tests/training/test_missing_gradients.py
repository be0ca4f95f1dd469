"""What is behind a hard step, an argmax, a rounding or a quantiser is not backprop's to move."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hybrid_opt.config import load_run
from hybrid_opt.errors import UserError
from hybrid_opt.training.gradient_check import gradient_lines
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from tests.conftest import PROSE, tiny_model, token_batch, token_losses

ES = {
    "type": "es",
    "population_size": 4,
    "sigma": 0.3,
    "learning_rate": 1e-2,
    "fitness_shaping": "none",
    "perturbation": {"type": "dense"},
}
SGD = {"type": "backprop", "learning_rate": 1e-2, "optimizer": "SGD"}
ONLY_BACKPROP = {"type": "single", "estimator": "backprop"}
BLEND = {"type": "blend", "weights": {"es": 1, "backprop": 1}}


class Behind(nn.Module):
    """A gate whose decision comes without a gradient, before two experts of which it chooses one."""

    def __init__(self, hard):
        super().__init__()
        torch.manual_seed(0)
        self.hard, self.gate = hard, nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])

    def forward(self, x):
        both = torch.cat([expert(x) for expert in self.experts], dim=1)
        return (self.hard(self.gate(x)) * both).sum(1)


def losses(model, batch):
    return (model(batch["x"]) - batch["y"]).square()


def batch():
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(32, 4, generator=generator), "y": torch.randn(32, generator=generator)}


HARD = {
    "step": lambda logits: (logits > 0).float(),
    "argmax": lambda logits: nn.functional.one_hot(logits.argmax(1), 2).float(),
    "rounding": lambda logits: (3 * logits).round() / 3,
    "quantiser": lambda logits: torch.fake_quantize_per_tensor_affine(logits.detach(), 0.1, 0, -8, 7),
}


def optimizer(model, objective=losses, schedule=ONLY_BACKPROP, policy=None, backprop=()):
    file = {"estimators": {"es": ES, "backprop": {**SGD, **dict(backprop)}}, "schedule": schedule}
    return HybridOptimizer(model, objective, schedule={**file, "policy": policy} if policy else file)


@pytest.mark.parametrize("hard", HARD)
def test_each_kind_is_found_in_the_second_step(hard):
    found = optimizer(Behind(HARD[hard]), policy=[{"match": ".*", "use": ["backprop"]}])
    found.step(batch())
    before = {name: p.detach().clone() for name, p in found.engine.model.named_parameters()}
    with pytest.raises(UserError) as error:
        found.step(batch())
    assert str(error.value) == (
        "policy: gate.weight, gate.bias have no gradient: it was zero in 2 steps, as behind a hard step, an argmax, a rounding or a quantiser, or "
        "where a batch does not come by. Before the rule that leaves them to 'backprop' alone write {match: 'gate\\.weight|gate\\.bias', use: [es]}; "
        "or for 'backprop' missing_gradients: ignore"
    )
    assert all(torch.equal(p, before[name]) for name, p in found.engine.model.named_parameters())


def test_the_rule_of_the_message_helps():
    """ES then moves the gate, by its estimate of the loss of the hard gate, and backprop the experts."""
    model = Behind(HARD["argmax"])
    gate = model.gate.weight.detach().clone()
    found = optimizer(
        model,
        schedule=BLEND,
        policy=[{"match": r"gate\.weight|gate\.bias", "use": ["es"]}, {"match": ".*", "use": ["backprop"]}],
    )
    first = found.step(batch()).loss
    for _ in range(30):
        last = found.step(batch()).loss
    assert last < first
    assert not torch.equal(model.gate.weight, gate)


@pytest.mark.parametrize(
    ("policy", "backprop"),
    [
        ([{"match": ".*", "use": ["es", "backprop"]}], {}),
        ([{"match": "gate", "use": "frozen"}, {"match": ".*", "use": ["backprop"]}], {}),
        ([{"match": ".*", "use": ["backprop"]}], {"missing_gradients": "ignore"}),
    ],
)
def test_what_is_not_backprops_alone_need_not_have_one(policy, backprop):
    found = optimizer(Behind(HARD["argmax"]), policy=policy, backprop=backprop)
    for _ in range(3):
        found.step(batch())


def test_a_gradient_that_is_zero_only_at_the_start_is_none_that_is_missing():
    """LoRA's A has none until B has moved."""
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear"))
    found = optimizer(model, token_losses, policy=[{"match": ".*", "use": ["backprop"]}])
    for _ in range(3):
        found.step(token_batch())
    assert found.missing.seen == set(found.engine.parameters)
    assert any("lora_A" in name for name in found.missing.looks)


def test_a_loss_without_any_gradient_has_a_message_of_its_own():
    found = optimizer(
        Behind(HARD["step"]),
        lambda model, batch: 0 * losses(model, batch),
        policy=[{"match": ".*", "use": ["backprop"]}],
    )
    found.step(batch())
    with pytest.raises(UserError, match="no parameter that 'backprop' may move has a gradient"):
        found.step(batch())


def test_nothing_is_read_once_all_gradients_were_seen(monkeypatch):
    found = optimizer(tiny_model(), token_losses, policy=[{"match": ".*", "use": ["backprop"]}])
    found.step(token_batch())
    monkeypatch.setattr(type(found.missing), "_zero", None)
    found.step(token_batch())


def test_check_takes_the_steps_that_would_tell(write_run, tmp_path, monkeypatch):
    """Of the small pretrained model all has a gradient; of losses that look at one matrix, that matrix alone."""
    run = load_run(write_run(schedule="backprop_then_es"))
    assert list(gradient_lines(run)) == ["gradients: 38 of the 38 tensors that backprop may move in phase 0 have one"]
    assert list(gradient_lines(load_run(write_run(schedule="es_only")))) == [
        "gradients: no backprop acts, so none are needed"
    ]
    (tmp_path / "one_matrix.py").write_text(
        "def losses(model, batch):\n"
        "    return model.lm_head.weight.square().mean() + 0 * batch['input_ids'].float().mean(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = {"train": str(PROSE), "text": "text", "max_tokens": 16}
    own = {"data": data, "objective": {"type": "function", "function": "one_matrix:losses"}}
    shared = load_run(write_run(**own, schedule="alternate"))
    (line,) = gradient_lines(shared, allow_code=True)
    assert line.startswith(
        "gradients: 1 of the 38 tensors that backprop may move have one; without are model.layers.0."
    )
    with pytest.raises(UserError, match=r"policy: model\.layers\.0.* and 34 more have no gradient"):
        list(gradient_lines(load_run(write_run(**own, schedule="backprop_only")), allow_code=True))
