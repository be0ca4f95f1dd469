"""What a torch optimizer keeps of gradients, and what becomes of it after a rest."""

from typing import get_args

import pytest
import torch

from hybrid_opt import HybridOptimizer
from hybrid_opt.config.estimators import Backprop, TorchOptimizerName
from hybrid_opt.engines.torch_optimizer import after_rest, build_optimizer
from tests.conftest import tiny_model, token_batch, token_losses


@pytest.mark.parametrize(
    ("optimizer", "arguments", "share"),
    [
        ("AdamW", {"betas": [0.75, 0.9]}, 0.25),
        ("SGD", {"momentum": 0.9}, 1.0),
        ("SGD", {}, None),
        ("RMSprop", {}, None),
    ],
)
def test_the_first_moment_is_what_the_optimizer_keeps_of_a_gradient(optimizer, arguments, share):
    model = tiny_model()
    token_losses(model, token_batch()).mean().backward()
    backprop = {"type": "backprop", "learning_rate": 1e-3, "optimizer": optimizer, "optimizer_arguments": arguments}
    document = {"estimators": {"backprop": backprop}, "schedule": {"type": "single", "estimator": "backprop"}}
    hybrid = HybridOptimizer(tiny_model(), token_losses, schedule=document)
    assert hybrid.engine.first_moment("lm_head.weight") is None
    hybrid.step(token_batch())
    for name, p in model.named_parameters():
        moment = hybrid.engine.first_moment(name)
        if share is None:
            assert moment is None
        else:
            torch.testing.assert_close(moment, share * p.grad.flatten(), rtol=1e-4, atol=1e-7)


def quartic(backprop: dict, steps: int, weights: torch.Tensor, optimizer=None):
    """An optimizer after some steps down `sum w^4`; weights are changed in place."""
    optimizer = optimizer or build_optimizer(Backprop(type="backprop", learning_rate=0.05, **backprop), [weights])
    for _ in range(steps):
        weights.grad = 4 * weights.detach() ** 3
        optimizer.step()
    return optimizer


def start() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([1.0, -0.5, 0.25]))


@pytest.mark.parametrize(
    "backprop",
    [
        {"optimizer": "AdamW"},
        {"optimizer": "Adam", "optimizer_arguments": {"amsgrad": True, "betas": [0.6, 0.8]}},
        {"optimizer": "SGD", "optimizer_arguments": {"momentum": 0.7, "nesterov": True}},
        {"optimizer": "SGD", "optimizer_arguments": {"momentum": 0.7, "dampening": 0.5}},
    ],
)
def test_state_that_decays_is_that_of_steps_without_gradient(backprop):
    one, two = start(), start()
    optimizer, reference = quartic(backprop, 3, one), quartic(backprop, 3, two)
    after_rest(optimizer, "decay", 5)
    where = two.detach().clone()
    for _ in range(5):
        two.grad = torch.zeros(3)
        reference.step()
        two.data.copy_(where)
    for key, value in reference.state[two].items():
        torch.testing.assert_close(optimizer.state[one][key], value, rtol=1e-5, atol=0)
    quartic(backprop, 2, one, optimizer)
    quartic(backprop, 2, two, reference)
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", sorted(get_args(TorchOptimizerName)))
def test_state_that_is_reset_is_that_of_a_new_optimizer(name):
    momentum = {"momentum": 0.7, "dampening": 0.5} if name == "SGD" else {}
    matrix = torch.linspace(0.2, 1, 6).view(2, 3)
    one, two = torch.nn.Parameter(matrix.clone()), torch.nn.Parameter(matrix.clone())
    backprop = {"optimizer": name, "optimizer_arguments": momentum}
    optimizer = quartic(backprop, 3, one)
    one.data.copy_(matrix)
    after_rest(optimizer, "reset", 2)
    quartic(backprop, 3, one, optimizer)
    quartic(backprop, 3, two)
    assert torch.equal(one, two)
    assert not torch.equal(one, matrix)
