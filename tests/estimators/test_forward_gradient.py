"""Forward gradients: slopes against autograd's, errors against their closed forms, and what cannot be differentiated."""

import pytest
import torch
from torch import nn

from hybrid_opt import HybridOptimizer
from hybrid_opt.config.forward_gradient import ForwardGradient
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.forward_gradient import ForwardGradientEstimator
from hybrid_opt.noise.drawing import gaussian
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import FunctionObjective
from tests.conftest import tiny_model, token_batch, token_losses
from tests.estimators.losses import errors_and_cosines, near

KEY = StepKey(0, 0, "forward_gradient")


def build(**options) -> ForwardGradientEstimator:
    return ForwardGradientEstimator(ForwardGradient(type="forward_gradient", learning_rate=1.0, **options))


def document(**options):
    estimator = {"type": "forward_gradient", "learning_rate": 1e-3, **options}
    return {
        "estimators": {"forward_gradient": estimator},
        "schedule": {"type": "single", "estimator": "forward_gradient"},
    }


def slopes_of_autograd(model, losses, batch, parameters, keys):
    gradients = dict(
        zip(parameters, torch.autograd.grad(losses(model, batch).mean(), parameters.values()), strict=True)
    )
    noise = [
        {n: gaussian([k.fold(n)], 0, p.numel(), p.device)[0].view_as(p) for n, p in parameters.items()} for k in keys
    ]
    return torch.stack([sum((gradients[n] * z[n]).sum() for n in parameters) for z in noise])


@pytest.mark.parametrize(
    ("distribution", "k", "expected"),
    [
        ("gaussian", 1, 49),
        ("gaussian", 4, 49 / 4),
        ("rademacher", 4, 47 / 4),
        ("sphere", 4, 47 / 4),
        ("orthogonal", 4, 11),
    ],
)
def test_mean_square_error_matches_its_closed_form(distribution, k, expected):
    errors, _ = errors_and_cosines(build(tangents=k, distribution=distribution), 6, 8, 400)
    assert near(errors, expected)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize(
    ("kind", "changes"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("gemma", {})]
)
def test_slopes_are_those_of_autograd(kind, changes, micro_batch_size):
    model, batch = tiny_model(kind, **changes), token_batch()
    batch["input_ids"].clamp_(min=1)  # backprop leaves the padding token's row out
    engine = LocalEngine(model)
    before = {n: p.detach().clone() for n, p in engine.parameters.items()}
    estimator = build(tangents=3, distribution="gaussian", micro_batch_size=micro_batch_size)
    estimate, cost = estimator.estimate(engine, FunctionObjective(token_losses), batch, list(engine.parameters), KEY)
    expected = slopes_of_autograd(model, token_losses, batch, engine.parameters, estimate.keys)
    assert torch.allclose(3 * estimate.coefficients.float(), expected, rtol=1e-4, atol=1e-5)
    assert cost.loss == pytest.approx(token_losses(model, batch).mean().item(), rel=1e-5)
    assert (cost.forwards, cost.backwards) == (3, 0)
    assert cost.statistics["gradient_norm"] == pytest.approx(expected.square().mean().sqrt().item(), rel=1e-4)
    assert all(torch.equal(before[n], p) for n, p in engine.parameters.items())
    assert all(p is q for p, q in zip(model.parameters(), engine.parameters.values(), strict=True))


def test_the_row_of_padding_has_its_true_slope():
    layer, ids = nn.Embedding(4, 3, padding_idx=0), torch.tensor([[0, 1], [2, 0]])

    def losses(model, batch):
        return model(batch).sum((1, 2))

    engine = LocalEngine(layer)
    estimate, _ = build(distribution="gaussian").estimate(engine, FunctionObjective(losses), ids, ["weight"], KEY)
    z = gaussian([estimate.keys[0].fold("weight")], 0, 12, ids.device)[0].view(4, 3)
    assert estimate.coefficients.item() == pytest.approx((z[0] + (z[1] + z[2]) / 2).sum().item(), rel=1e-5)


def test_a_weight_that_is_used_outside_its_module_has_its_part():
    model, x = nn.Linear(5, 3), torch.randn(4, 5)

    def losses(model, batch):
        return model(batch).pow(2).sum(1) + model.weight.pow(3).sum()

    engine = LocalEngine(model)
    estimate, _ = build(distribution="gaussian").estimate(engine, FunctionObjective(losses), x, ["weight", "bias"], KEY)
    expected = slopes_of_autograd(model, losses, x, engine.parameters, estimate.keys)
    assert torch.allclose(estimate.coefficients.float(), expected, rtol=1e-4)


def test_training_lowers_the_loss():
    hybrid = HybridOptimizer(tiny_model(), token_losses, schedule=document(tangents=16, learning_rate=2e-2), seed=1)
    losses = [hybrid.step(token_batch()).loss for _ in range(30)]
    assert losses[-1] < losses[0] - 0.02


def test_an_objective_without_gradient_is_refused():
    objective = FunctionObjective(token_losses, differentiable=False)
    with pytest.raises(UserError, match="'forward_gradient' is forward_gradient, but the objective has no gradient"):
        HybridOptimizer(tiny_model(), objective, schedule=document())
    detached = FunctionObjective(lambda model, batch: torch.tensor(token_losses(model, batch).tolist()))
    with pytest.raises(UserError, match="do not depend on the parameters through torch operations"):
        HybridOptimizer(tiny_model(), detached, schedule=document()).step(token_batch())


def test_an_operator_without_a_forward_derivative_is_named():
    def losses(model, batch):
        n = len(batch)
        inputs, targets = model(batch).transpose(0, 1).log_softmax(-1), torch.ones(n, 2, dtype=torch.long)
        lengths = torch.full((n,), 6), torch.full((n,), 2)
        return torch.nn.functional.ctc_loss(inputs, targets, *lengths, reduction="none")

    with pytest.raises(UserError, match=r"no forward-mode derivative .*ctc_loss.*use spsa or es"):
        HybridOptimizer(nn.Linear(5, 3), losses, schedule=document()).step(torch.randn(4, 6, 5))
