"""Update rules against torch's own optimizers."""

import pytest
import torch

from hybrid_opt.config.schedule import AdamRule, MomentumRule, SgdRule
from hybrid_opt.engines.update_rules import build_rule

RULES = {
    "sgd": (SgdRule(type="sgd"), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (MomentumRule(type="momentum", beta=0.8), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
    "adam": (AdamRule(type="adam", beta1=0.8, beta2=0.95), lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95))),
}


def gradients(count: int) -> torch.Tensor:
    return torch.randn(count, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", RULES)
def test_same_path_as_torch(kind):
    config, build_torch = RULES[kind]
    rule, weights, expected = build_rule(config), torch.ones(20), torch.ones(20)
    optimizer = build_torch([expected])
    for gradient in gradients(10):
        rule.update("w", weights, gradient, 0.1)
        expected.grad = gradient
        optimizer.step()
    assert torch.allclose(weights, expected, rtol=0, atol=1e-6)
    assert (weights - 1).abs().min() > 1e-3


@pytest.mark.parametrize("kind", RULES)
def test_state_can_be_saved_and_put_back(kind):
    config, _ = RULES[kind]
    whole, first = build_rule(config), build_rule(config)
    one, two = torch.ones(20), torch.ones(20)
    for gradient in gradients(4):
        whole.update("a.w", one, gradient, 0.1)
    for gradient in gradients(4)[:2]:
        first.update("a.w", two, gradient, 0.1)
    second = build_rule(config)
    second.load_state_dict({key: tensor.clone() for key, tensor in first.state_dict().items()})
    for gradient in gradients(4)[2:]:
        second.update("a.w", two, gradient, 0.1)
    assert torch.equal(one, two)


def test_narrow_weights_are_rounded_once():
    weights = torch.ones(3, dtype=torch.bfloat16)
    build_rule(SgdRule(type="sgd")).update("w", weights, torch.tensor([0.25, 1e-6, -0.5]), 1.0)
    assert weights.tolist() == [0.75, 1.0, 1.5]
