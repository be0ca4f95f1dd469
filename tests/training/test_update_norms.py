"""Norms of updates by layer and estimator, against the weights before and after."""

import pytest
import torch

from hybrid_opt import HybridOptimizer
from hybrid_opt.training.update_norms import UpdateNorms, layer_of
from tests.conftest import tiny_model, token_batch, token_losses

ES = {"type": "es", "population_size": 4, "sigma": 1e-3, "learning_rate": 1e-2, "fitness_shaping": "none"}
BOTH = {"es": ES, "backprop": {"type": "backprop", "learning_rate": 1e-2}}


def watched_step(schedule, policy=None, **changes):
    """What `UpdateNorms` says of the first step of a model, and each parameter's change."""
    model = tiny_model(**changes)
    optimizer = HybridOptimizer(
        model, token_losses, schedule={"estimators": BOTH, "schedule": schedule, "policy": policy}, seed=1
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norms = UpdateNorms(optimizer.engine)
    acting = optimizer.acting()
    norms.before(optimizer.may_come_to_move(acting))
    optimizer.step(token_batch())
    return norms.after({name: optimizer.may_move(name) for name in acting}), {
        name: (p.detach() - before[name]) for name, p in model.named_parameters()
    }


def norm_of_layer(changes, layer):
    return torch.cat([change.flatten() for name, change in changes.items() if layer_of(name) == layer]).norm().item()


def test_each_layers_norm_is_that_of_its_change():
    found, changes = watched_step({"type": "single", "estimator": "es"})
    assert set(found) == {"es"}
    assert set(found["es"]) == {"embed_tokens", "0", "1", "norm", "lm_head"}
    for layer, norm in found["es"].items():
        assert norm == pytest.approx(norm_of_layer(changes, layer), rel=1e-4)


def test_a_policy_that_splits_the_layers_splits_the_norms():
    policy = [
        {"layers": "1", "use": ["backprop"]},
        {"layers": "0", "use": ["es", "backprop"]},
        {"match": ".*", "use": "frozen"},
    ]
    found, changes = watched_step({"type": "blend", "weights": {"es": 1, "backprop": 1}}, policy)
    assert {who: list(layers) for who, layers in found.items()} == {"es+backprop": ["0"], "backprop": ["1"]}
    assert found["backprop"]["1"] == pytest.approx(norm_of_layer(changes, "1"), rel=1e-4)


def test_a_large_parameter_is_sampled():
    """Embeddings of 4000 x 32 values, of which every 31st is looked at."""
    found, changes = watched_step({"type": "single", "estimator": "es"}, vocab_size=4000)
    assert found["es"]["embed_tokens"] == pytest.approx(norm_of_layer(changes, "embed_tokens"), rel=0.05)
    assert found["es"]["embed_tokens"] != pytest.approx(norm_of_layer(changes, "embed_tokens"), rel=1e-6)


def test_names_of_layers():
    assert layer_of("model.layers.11.mlp.up_proj.weight") == "11"
    assert layer_of("model.embed_tokens.weight") == "embed_tokens"
    assert layer_of("weight") == "weight"
