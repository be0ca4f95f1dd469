"""What a step leaves behind brings the weights back, bit for bit, without evaluating anything."""

import json

import pytest
import torch

from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from tests.conftest import tiny_model, token_batch, token_losses

DENSE = {"perturbation": {"type": "dense"}}
SPSA = {"type": "spsa", "pairs": 2, "learning_rate": 1e-2}
ES = {"type": "es", "population_size": 6, "learning_rate": 1e-2}


def with_wrappers(estimator: dict, *wrappers: dict) -> dict:
    return {**estimator, "wrappers": list(wrappers)}


ESTIMATORS = {
    "es low rank": ES,
    "es one-sided": {**ES, "antithetic": False, "fitness_shaping": "centered_rank", "population_size": 7},
    "es adam": {**ES, "update": {"type": "adam"}},
    "es momentum rule": {**ES, "update": {"type": "momentum"}, "anchor": 0.1},
    "spsa dense": {**SPSA, **DENSE},
    "spsa orthogonal": {**SPSA, "perturbation": {"type": "dense", "distribution": "orthogonal"}},
    "spsa sphere": {**SPSA, "perturbation": {"type": "dense", "distribution": "sphere"}},
    "lazy subspace": {**SPSA, "perturbation": {"type": "lazy_subspace", "noise_rank": 2, "refresh": 3}},
    "align": {"type": "align", "pairs": 2, "learning_rate": 1.0},
    "fzoo reuse": {"type": "fzoo", "population_size": 4, "reuse": True, "learning_rate": 1e-3, **DENSE},
    "forward_gradient": {"type": "forward_gradient", "tangents": 2, "learning_rate": 1e-2},
    "layer_subset": with_wrappers(ES, {"type": "layer_subset", "layers": 1}),
    "mask of small weights": with_wrappers({**SPSA, **DENSE}, {"type": "sparse_mask", "keep": 0.3, "refresh": 2}),
    "mask at random": with_wrappers({**SPSA, **DENSE}, {"type": "sparse_mask", "keep": 0.3, "by": "random", "refresh": 2}),
    "mask in layers": with_wrappers(
        {**SPSA, **DENSE}, {"type": "sparse_mask", "keep": 0.3, "refresh": 2}, {"type": "layer_subset", "layers": 1}
    ),
    "relative_sigma": with_wrappers(ES, {"type": "relative_sigma", "refresh": 2}),
    "norm_cap": with_wrappers(ES, {"type": "norm_cap", "norm": 0.01}),
    "momentum": with_wrappers(ES, {"type": "momentum", "window": 3}),
    "momentum of a lazy subspace's layers": with_wrappers(
        {**SPSA, "perturbation": {"type": "lazy_subspace", "noise_rank": 2, "refresh": 2}},
        {"type": "layer_subset", "layers": 1},
        {"type": "momentum", "window": 3},
    ),
    "control_variate": with_wrappers(ES, {"type": "control_variate", "refresh": 3, "terms": 2}),
}  # fmt: skip


def optimizer_of(estimator: dict, **more) -> HybridOptimizer:
    schedule = {"estimators": {"own": estimator}, "schedule": {"type": "single", "estimator": "own"}, **more}
    return HybridOptimizer(tiny_model(), token_losses, schedule=schedule, seed=3)


def weights_of(optimizer: HybridOptimizer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in optimizer.engine.parameters.items()}


def documents_of(optimizer: HybridOptimizer, steps: int) -> list[dict]:
    """The records of so many steps, through JSON."""
    taken = [optimizer.step(token_batch()).record.document(optimizer.engine) for _ in range(steps)]
    return json.loads(json.dumps(taken))


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_records_bring_back_every_bit(kind):
    trained = optimizer_of(ESTIMATORS[kind])
    documents = documents_of(trained, 5)
    again = optimizer_of(ESTIMATORS[kind])
    start = weights_of(again)
    for document in documents:
        again.replay(document)
    assert again.signals.step == 5
    for name, weights in weights_of(trained).items():
        assert torch.equal(weights_of(again)[name], weights), name
    assert any(not torch.equal(start[name], weights) for name, weights in weights_of(again).items())
