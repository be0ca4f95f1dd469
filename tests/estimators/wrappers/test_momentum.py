"""Momentum from keys: equal to a buffer, truncated at its window, and the same after a checkpoint."""

import pytest
import torch

from hybrid_opt import HybridOptimizer
from hybrid_opt.errors import UserError
from tests.conftest import tiny_model, token_batch, token_losses

DENSE = {"type": "dense", "distribution": "gaussian"}
LOW_RANK = {"type": "low_rank", "noise_rank": 2}


def hybrid(*wrappers, kind="spsa", **options):
    estimator = {"type": kind, "learning_rate": 1e-3, "wrappers": list(wrappers), **options}
    document = {"estimators": {"a": estimator}, "schedule": {"type": "single", "estimator": "a"}}
    return HybridOptimizer(tiny_model(), token_losses, schedule=document, seed=3)


def momentum(**options):
    return {"type": "momentum", "beta": 0.8, "window": 9, **options}


def weights(optimizer):
    return torch.cat([p.detach().flatten() for p in optimizer.engine.parameters.values()])


INNER = [(), ({"type": "layer_subset", "layers": 1},), ({"type": "norm_cap", "norm": 0.5},)]


@pytest.mark.parametrize("inner", INNER, ids=["plain", "layer_subset", "norm_cap"])
@pytest.mark.parametrize("perturbation", [DENSE, LOW_RANK], ids=["dense", "low_rank"])
def test_it_equals_a_buffer(perturbation, inner):
    ours = hybrid(*inner, momentum(), perturbation=perturbation)
    buffer = hybrid(*inner, perturbation=perturbation, update={"type": "momentum", "beta": 0.8})
    plain = hybrid(*inner, perturbation=perturbation)
    start = weights(ours)
    for _ in range(5):
        for optimizer in (ours, buffer, plain):
            optimizer.step(token_batch())
    moved = (weights(buffer) - start).norm()
    assert (weights(ours) - weights(buffer)).norm() < 1e-3 * moved
    assert (weights(ours) - weights(plain)).norm() > 0.1 * moved


def test_what_is_older_than_the_window_is_left_out():
    ours, plain = hybrid(momentum(window=1)), hybrid()
    for _ in range(3):
        ours.step(token_batch())
        plain.step(token_batch())
    assert torch.equal(weights(ours), weights(plain))


@pytest.mark.parametrize("inner", INNER, ids=["plain", "layer_subset", "norm_cap"])
@pytest.mark.parametrize("perturbation", [DENSE, LOW_RANK], ids=["dense", "low_rank"])
def test_a_resumed_run_goes_on_bitwise(perturbation, inner, tmp_path):
    first = hybrid(*inner, momentum(), perturbation=perturbation)
    for _ in range(4):
        first.step(token_batch())
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = hybrid(*inner, momentum(), perturbation=perturbation)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        first.step(token_batch())
        second.step(token_batch())
    assert torch.equal(weights(first), weights(second))


def test_forward_gradients_can_be_replayed():
    ours, buffer = (
        hybrid(momentum(), kind="forward_gradient"),
        hybrid(kind="forward_gradient", update={"type": "momentum", "beta": 0.8}),
    )
    start = weights(ours)
    for _ in range(3):
        ours.step(token_batch())
        buffer.step(token_batch())
    assert (weights(ours) - weights(buffer)).norm() < 1e-3 * (weights(buffer) - start).norm()


def test_low_rank_noise_that_depends_on_an_evaluation_is_refused():
    with pytest.raises(UserError, match=r"those of spsa depend on more .*otherwise: dense or frozen"):
        hybrid(momentum(), perturbation={"type": "low_rank", "otherwise": "frozen"})


def test_a_stale_gradient_cannot_be_replayed():
    with pytest.raises(UserError, match=r"those of stale_gradient depend on more.*update: \{type: momentum\}"):
        hybrid(momentum(), kind="stale_gradient")
