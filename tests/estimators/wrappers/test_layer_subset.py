"""Blocks of layers: all equally often, and within a block the inner estimate."""

from collections import Counter

import pytest
import torch

from hybrid_opt import HybridOptimizer
from hybrid_opt.config.wrappers import LayerSubset
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.wrappers.layer_subset import LayerSubsetEstimator
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import FunctionObjective
from hybrid_opt.scheduling.policy import layer_number
from tests.conftest import tiny_model, token_batch, token_losses
from tests.estimators.test_spsa import build


def test_each_step_is_the_inner_estimate_of_a_block():
    engine, objective, batch = LocalEngine(tiny_model()), FunctionObjective(token_losses), token_batch()
    spsa, names = build(sigma=0.01), list(engine.parameters)
    subset = LayerSubsetEstimator(spsa, LayerSubset(type="layer_subset", layers=1))
    chosen = Counter()
    for step in range(12):
        key = StepKey(0, step, "spsa")
        estimate, _ = subset.estimate(engine, objective, batch, names, key)
        moved = [shard.name for shard in engine.shards(names) if estimate.read(shard).any()]
        (layer,) = {layer_number(name) for name in moved}
        assert moved == [name for name in names if layer_number(name) == layer]
        chosen[layer] += 1
        alone, _ = spsa.estimate(engine, objective, batch, moved, key)
        assert all(torch.equal(estimate.read(s), alone.read(s)) for s in engine.shards(moved))
    assert len(chosen) == len({layer_number(name) for name in names})


def test_more_layers_than_there_are_is_an_error():
    wrappers = [{"type": "layer_subset", "layers": 9}]
    estimator = {"type": "spsa", "learning_rate": 1e-3, "wrappers": wrappers}
    schedule = {"estimators": {"spsa": estimator}, "schedule": {"type": "single", "estimator": "spsa"}}
    with pytest.raises(UserError, match="layers: 9 are more than the 3"):
        HybridOptimizer(tiny_model(), token_losses, schedule=schedule)
