"""What estimators remember goes into a checkpoint and comes back bitwise, whatever it is made of."""

import pytest
import torch

from hybrid_opt import HybridOptimizer
from hybrid_opt.engines.ranks import Ranks
from hybrid_opt.recovery.checkpoint import load_checkpoint, save_checkpoint
from hybrid_opt.recovery.state_files import read_state, write_state
from tests.conftest import tiny_model, token_batch, token_losses

DENSE = {"type": "dense"}
WRAPPED = {
    "momentum": {"type": "momentum"},
    "control_variate": {"type": "control_variate", "refresh": 3},
    "sensitivity": {"type": "sparse_mask", "keep": 0.1, "by": "sensitivity", "refresh": 2},
    "magnitude": {"type": "sparse_mask", "keep": 0.1, "refresh": 2},
    "relative_sigma": {"type": "relative_sigma", "refresh": 4},
}
ESTIMATORS = {
    **{name: {"type": "spsa", "pairs": 2, "perturbation": DENSE, "wrappers": [w]} for name, w in WRAPPED.items()},
    "fzoo": {"type": "fzoo", "population_size": 4, "reuse": True},
    "gradients": {"type": "guided", "pairs": 3, "guides": {"type": "gradients", "count": 2}},
    "moment": {
        "type": "guided",
        "pairs": 3,
        "guides": {"type": "first_moment"},
        "storage": {"type": "sketch", "rank": 2},
    },
    "estimates": {"type": "guided", "pairs": 3, "guides": {"type": "estimates"}},
    "stale": {"type": "stale_gradient"},
}


def started(config: dict) -> HybridOptimizer:
    backprop = {"type": "backprop", "learning_rate": 1e-2}
    estimators = {"backprop": backprop, "other": {"learning_rate": 1e-3, **config}}
    schedule = {"type": "alternate", "pattern": {"backprop": 1, "other": 4}}
    return HybridOptimizer(
        tiny_model(), token_losses, schedule={"estimators": estimators, "schedule": schedule}, seed=3
    )


def test_tensors_are_read_to_aligned_memory(tmp_path):
    """In the file they begin anywhere; sums of products over them would be rounded otherwise than before."""
    for length in range(1, 9):  # of a name, which moves what follows it in the file
        place = tmp_path / str(length)
        write_state(place, {"x" * length: torch.randn(33), "y": torch.randn(33)})
        read_state(place, state := {})
        assert all(tensor.data_ptr() % 64 == 0 for tensor in state.values())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_run_goes_on_from_its_checkpoint_bitwise(name, tmp_path):
    first, second = started(ESTIMATORS[name]), started(ESTIMATORS[name])
    for _ in range(4):
        first.step(token_batch())
    second.load_state_dict(load_checkpoint(save_checkpoint(tmp_path, 4, Ranks(), lambda place: first.state_dict())))
    for _ in range(4):
        one, other = first.step(token_batch()), second.step(token_batch())
        assert (one.loss, one.costs.keys()) == (other.loss, other.costs.keys())
    for p, q in zip(first.engine.parameters.values(), second.engine.parameters.values(), strict=True):
        assert torch.equal(p, q)
