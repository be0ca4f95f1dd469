"""What a torch optimizer keeps of gradients."""

import pytest
import torch

from hybrid_opt import HybridOptimizer
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
