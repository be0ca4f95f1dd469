"""Update rules against torch's own optimizers."""

import pytest
import torch

from hybrid_opt.config.steps import AdamRule, MomentumRule, SgdRule
from hybrid_opt.engines.contract import Shard
from hybrid_opt.engines.local import Gradients
from hybrid_opt.engines.update_rules import build_rule

RULES = {
    "sgd": (SgdRule(type="sgd"), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (MomentumRule(type="momentum", beta=0.8), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
    "adam": (AdamRule(type="adam", beta1=0.8, beta2=0.95), lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95))),
}


def gradients(count: int) -> torch.Tensor:
    return torch.randn(count, 20, generator=torch.Generator().manual_seed(0))


def step(rule, weights: torch.Tensor, gradient: torch.Tensor, weight: float = 1.0):
    shard = Shard("a.w", weights, 0, weights.shape)
    rule.update(shard, Gradients({"a.w": gradient}), weight, 0.1)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("weight", [1.0, -0.25])
def test_same_path_as_torch(kind, weight):
    config, build_torch = RULES[kind]
    rule, weights, expected = build_rule(config), torch.ones(20), torch.ones(20)
    optimizer = build_torch([expected])
    for gradient in gradients(10):
        expected.grad = weight * gradient
        step(rule, weights, gradient, weight)
        optimizer.step()
    assert torch.allclose(weights, expected, rtol=0, atol=1e-6)
    assert (weights - 1).abs().min() > 1e-4


@pytest.mark.parametrize("kind", RULES)
def test_a_slice_moves_as_it_does_in_the_whole_and_the_estimate_stays(kind):
    gradient = gradients(1)[0]
    whole, part, estimate = torch.ones(20), torch.ones(6), Gradients({"a.w": gradient})
    build_rule(RULES[kind][0]).update(Shard("a.w", whole, 0, whole.shape), estimate, 0.5, 0.1)
    build_rule(RULES[kind][0]).update(Shard("a.w", part, 3, whole.shape), estimate, 0.5, 0.1)
    assert torch.equal(gradient, gradients(1)[0])
    assert torch.equal(part, whole[3:9])


@pytest.mark.parametrize("kind", RULES)
def test_state_can_be_saved_and_put_back(kind):
    config, _ = RULES[kind]
    whole, first = build_rule(config), build_rule(config)
    one, two = torch.ones(20), torch.ones(20)
    for gradient in gradients(4):
        step(whole, one, gradient)
    for gradient in gradients(4)[:2]:
        step(first, two, gradient)
    second = build_rule(config)
    second.load_state_dict({key: tensor.clone() for key, tensor in first.state_dict().items()})
    for gradient in gradients(4)[2:]:
        step(second, two, gradient)
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_a_memory_that_decays_is_that_of_steps_without_gradient(kind):
    """Such steps with a learning rate of 0, so that they move nothing."""
    rule, reference = build_rule(RULES[kind][0]), build_rule(RULES[kind][0])
    one, two = torch.ones(20), torch.ones(20)
    for gradient in gradients(3):
        step(rule, one, gradient)
        step(reference, two, gradient)
    rule.after_rest("decay", 4)
    for _ in range(4):
        reference.update(Shard("a.w", two, 0, two.shape), Gradients({"a.w": torch.zeros(20)}), 1.0, 0.0)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(rule.state_dict()[key], value, rtol=1e-6, atol=0)
    assert torch.equal(one, two)
    for gradient in gradients(2):
        step(rule, one, gradient)
        step(reference, two, gradient)
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("kind", RULES)
def test_a_memory_that_is_reset_is_that_of_a_new_rule(kind):
    rule, new = build_rule(RULES[kind][0]), build_rule(RULES[kind][0])
    one, two = torch.ones(20), torch.ones(20)
    step(rule, torch.zeros(20), gradients(1)[0])
    rule.after_rest("reset", 1)
    for gradient in gradients(3):
        step(rule, one, gradient)
        step(new, two, gradient)
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", RULES)
def test_the_direction_is_what_an_update_would_take_off(kind):
    rule, weights = build_rule(RULES[kind][0]), torch.zeros(20)
    for gradient in gradients(3):
        estimate, shard = Gradients({"a.w": gradient}), Shard("a.w", weights, 0, weights.shape)
        direction = rule.direction(shard, estimate, -0.5)
        assert torch.equal(direction, rule.direction(shard, estimate, -0.5))
        before = weights.clone()
        step(rule, weights, gradient, -0.5)
        torch.testing.assert_close(before - weights, 0.1 * direction)
