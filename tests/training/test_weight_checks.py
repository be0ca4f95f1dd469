"""Writes of weights outside updates, and weights that an update has lost."""

import math

import pytest
import torch
from torch import nn

from hybrid_opt import HybridOptimizer, Trainer
from hybrid_opt.display.progress import Silence
from hybrid_opt.errors import DivergedError, DriftError
from hybrid_opt.recovery.checkpoint import checkpoints

SGD = {"type": "backprop", "optimizer": "SGD", "learning_rate": 0.1}
ES = {"type": "es", "population_size": 6, "learning_rate": 0.1, "perturbation": {"type": "dense"}}
LOW_RANK = {**ES, "perturbation": {"type": "low_rank"}}
NAMES = ["0.weight", "0.bias", "1.weight", "1.bias"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    result = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    result[1].bias.requires_grad_(False)
    return result


def losses(model, batch):
    return model(batch).square().sum(1)


def document(estimator) -> dict:
    return {"estimators": {"a": estimator}, "schedule": {"type": "single", "estimator": "a"}}


def optimizer(estimator, *, every=1, losses=losses) -> HybridOptimizer:
    return HybridOptimizer(model(), losses, schedule=document(estimator), check_drift_every=every)


def writes(optimizer: HybridOptimizer, name: str) -> None:
    """Turn the sign of the smallest thing there is to turn: one value."""
    values = dict(optimizer.engine.model.named_parameters())[name].data.view(-1)
    values[-1] = -values[-1]


BATCH = torch.ones(5, 3)


@pytest.mark.parametrize("estimator", [SGD, ES, LOW_RANK], ids=["backprop", "dense es", "low rank es"])
@pytest.mark.parametrize("name", NAMES)
def test_a_write_between_updates_is_named(estimator, name):
    run = optimizer(estimator)
    for _ in range(3):
        run.step(BATCH)  # its own way of perturbing and restoring is no drift
    writes(run, name)
    with pytest.raises(DriftError) as error:
        run.step(BATCH)
    assert str(error.value) == (
        f"step 3: parameter {name} has changed since step 2 while nobody updated it; an objective or a hook writes weights: let it write "
        "to a copy, or write check_drift_every: 0 if that is what you want"
    )


def test_each_parameter_has_its_turn():
    """With every = 4, parameter i of 4 is compared in steps i, i + 4, ...; a write of all of them is noticed at once."""
    for number, name in enumerate(NAMES):
        run, noticed = optimizer(SGD, every=4), []
        for step in range(9):
            writes(run, name)
            try:
                run.step(BATCH)
            except DriftError:
                noticed.append(step)
                run.checks.forget()
                run.skip_step()
        assert noticed == [step for step in range(1, 9) if step % 4 == number]


def test_an_objective_that_writes_weights_ends_a_run_and_its_weights_are_not_saved(tmp_path):
    calls = []

    def meddling(model, batch):
        calls.append(1)
        if len(calls) == 4:
            model[0].weight.data += 1e-6
        return losses(model, batch)

    options = {"steps": 9, "output": tmp_path, "display": Silence(), "checkpoint_every": 2, "saves_model": False}
    run = Trainer(model(), meddling, [BATCH], schedule=document(SGD), check_drift_every=1, **options)
    with pytest.raises(DriftError, match=r"^step 3: parameter 0.weight has changed since step 2 .*is what you want$"):
        run.train()
    assert checkpoints(tmp_path / "checkpoints")[0].name.endswith("2")
    again = Trainer(model(), meddling, [BATCH], schedule=document(SGD), check_drift_every=0, resume=True, **options)
    assert again.train().steps == 9


def test_a_checkpoint_that_is_loaded_is_no_drift():
    run, other = optimizer(SGD), optimizer(SGD)
    run.step(BATCH)
    other.step(BATCH)
    other.step(BATCH)
    other.load_state_dict(run.state_dict())
    other.step(BATCH)
    run.step(BATCH)
    assert all(
        torch.equal(a, b) for a, b in zip(run.engine.model.parameters(), other.engine.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("estimator", [SGD, ES], ids=["backprop", "es"])
def test_a_weight_that_an_update_has_lost_is_named(estimator):
    run = optimizer({**estimator, "update": {"type": "sgd"}} if estimator is ES else estimator)
    run.step(BATCH)
    apply = run.engine.apply

    def losing(contributions, step):
        apply(contributions, step)
        run.engine.parameters["1.weight"].data[1, 2] = math.inf

    run.engine.apply = losing
    with pytest.raises(
        DivergedError,
        match=r"^step 1: after the update parameter 1.weight has values that are not finite; lower the lear",
    ):
        run.step(BATCH)


def test_a_master_that_its_narrow_copy_cannot_hold_is_named():
    made = model().half()
    run = HybridOptimizer(
        made, lambda model, batch: model(batch.half()).float().sum(1), schedule=document({**SGD, "learning_rate": 1e6})
    )
    with pytest.raises(DivergedError, match=r"parameter 0\.weight has values that are not finite"):
        run.step(BATCH * 3)
    assert run.engine.is_finite()  # the float32 masters are
