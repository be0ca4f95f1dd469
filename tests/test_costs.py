"""What `plan` says of an estimator's cost is what its steps cost."""

import pytest
import torch

from hybrid_opt import HybridOptimizer
from hybrid_opt.config import load_run, load_schedule, recipes
from hybrid_opt.config.schedule import acting_names
from hybrid_opt.estimators.forward_gradient import DUAL_FORWARD
from hybrid_opt.planning.checking import cost_table
from tests.conftest import tiny_model, token_batch, token_losses


@pytest.mark.parametrize("recipe", [name for name in recipes() if not name.startswith("zero")])
def test_forward_passes_are_those_of_a_step(recipe):
    config, batch = load_schedule(recipe), token_batch(examples=8)
    for name in acting_names(config.schedule):
        estimator, single = config.estimators[name], {"type": "single", "estimator": name}
        document = {**config.model_dump(mode="json"), "policy": None, "schedule": single}
        document["estimators"][name].pop("trust", None)  # compares with steps of backprop
        if estimator.needs_gradient:
            continue  # acts on what backprop has left behind: tested where it is
        cost = HybridOptimizer(tiny_model(), token_losses, schedule=document, steps=9).step(batch).costs[name]
        assert cost.forwards == estimator.forwards
        assert cost.forward_equivalents * len(batch["input_ids"]) == pytest.approx(
            estimator.forwards * estimator.examples(8) * (DUAL_FORWARD if estimator.type == "forward_gradient" else 1)
            + cost.backwards * 2 * 8
        )


@pytest.mark.parametrize("update", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("anchor", [0.0, 0.1])
def test_kept_memory_is_that_of_the_rule_and_the_anchor(update, anchor):
    spsa = {"type": "spsa", "learning_rate": 1e-3, "update": {"type": update}, "anchor": anchor}
    document = {"estimators": {"spsa": spsa}, "schedule": {"type": "single", "estimator": "spsa"}}
    hybrid = HybridOptimizer(tiny_model(), token_losses, schedule=document)
    hybrid.step(token_batch())
    shapes = {name: tuple(p.shape) for name, p in hybrid.engine.parameters.items()}
    told = hybrid.config.estimators["spsa"].keeps(shapes)
    state = [
        t for t in hybrid.updates.rules["spsa"].state_dict().values() if t.dim()
    ]  # without Adam's numbers of steps
    assert told.get(f"{update}'s state", 0) == sum(t.nbytes for t in state)
    assert told.get("anchor", 0) == sum(t.nbytes for t in hybrid.updates.anchor.start.values())


def test_the_optimizers_state_is_that_of_torch():
    for optimizer, arguments in (
        ("AdamW", {}),
        ("SGD", {}),
        ("SGD", {"momentum": 0.9}),
        ("RMSprop", {}),
        ("Adagrad", {}),
    ):
        backprop = {"type": "backprop", "learning_rate": 1e-3, "optimizer": optimizer, "optimizer_arguments": arguments}
        document = {"estimators": {"backprop": backprop}, "schedule": {"type": "single", "estimator": "backprop"}}
        hybrid = HybridOptimizer(tiny_model(), token_losses, schedule=document)
        hybrid.step(token_batch())
        states = [v for s in hybrid.engine.optimizer.state.values() for v in s.values()]
        found = sum(v.nbytes for v in states if isinstance(v, torch.Tensor) and v.dim())
        values = sum(p.numel() for p in hybrid.engine.parameters.values())
        assert hybrid.config.estimators["backprop"].state_values * 4 * values == found, optimizer


def test_the_table_says_it_for_every_estimator_that_acts(write_run):
    run = load_run(write_run(schedule="alternate"))
    table = cost_table(run)
    cells = dict(zip(("es", "backprop"), zip(*(column.cells for column in table.columns), strict=True), strict=True))
    assert cells["es"][1:4] == ("8", "0", str(run.training.batch_size))
    assert cells["backprop"][1:3] == ("1", "1")
    assert "AdamW's state" in cells["backprop"][4]
    assert "activations" in cells["backprop"][4]
