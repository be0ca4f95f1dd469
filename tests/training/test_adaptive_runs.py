"""Runs whose schedule decides who acts: what is measured, undone, and resumed."""

import pytest
import torch
from safetensors.torch import load_file

from hybrid_opt.display.progress import Silence
from hybrid_opt.errors import UserError
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from hybrid_opt.training.trainer import Trainer
from tests.conftest import interrupt_after, tiny_model, token_batch, token_losses
from tests.training.test_trainer import lines

ES = {"type": "es", "population_size": 6, "learning_rate": 1e-2, "fitness_shaping": "none", "update": {"type": "adam"}}
ADAMW = {"type": "backprop", "learning_rate": 1e-2}


def schedule(es=(), backprop=(), **more) -> dict:
    adaptive = {"type": "adaptive", "estimators": ["es", "backprop"], "block": 6, "per": "forward_equivalent", **more}
    return {"estimators": {"es": {**ES, **dict(es)}, "backprop": {**ADAMW, **dict(backprop)}}, "schedule": adaptive}


def trainer(chosen, folder, steps=14, **more) -> Trainer:
    return Trainer(
        tiny_model(), token_losses, [token_batch()], schedule=chosen, steps=steps, output=folder,
        probe=[token_batch(tokens=5)], display=Silence(), **more,
    )  # fmt: skip


def row_of(row: dict) -> tuple:
    return row["estimators"], row["loss"], row.get("decision"), row.get("account")


def test_a_run_is_that_of_its_decisions_taken_by_hand(tmp_path):
    """The same estimators in a loop of one's own, with rates computed from the losses on the same probe rows."""
    trainer(schedule(exploration=0), tmp_path).train()
    rows = lines(tmp_path / "metrics.jsonl")
    own = HybridOptimizer(tiny_model(), token_losses, schedule=schedule(exploration=0))

    def probe() -> float:
        with torch.no_grad():
            return token_losses(own.engine.model.eval(), token_batch(tokens=5)).double().mean().item()

    rates, start = {}, probe()
    for turn, (name, steps) in enumerate((("es", 1), ("backprop", 2))):
        assert own.asks()
        own.tell({"probe_loss": start})
        assert [row["estimators"] for row in rows[turn : turn + steps]] == [[name]] * steps
        for _ in range(steps):
            assert own.acting() == [name]
            own.step(token_batch())
        rates[name], start = (start - probe()) / 6, probe()
    better = max(rates, key=rates.get)
    assert better == "backprop"
    assert rows[3]["account"] == {n: {"rate": pytest.approx(r), "index": pytest.approx(r)} for n, r in rates.items()}
    assert [row["estimators"] for row in rows[3:]] == [[better]] * 11
    assert [row["step"] for row in rows if "decision" in row] == [0, 1, 3, 5, 7, 9, 11, 13]


def test_harm_is_undone_and_the_run_goes_on_from_the_blocks_start(tmp_path):
    harmful = schedule(es={"learning_rate": 0.5}, roll_back_above=0.05)
    run = trainer(harmful, tmp_path, steps=3)
    start = {name: p.detach().clone() for name, p in run.optimizer.engine.parameters.items()}
    interrupt_after(run, step=0)
    run.train()
    moved = {name: p.detach().clone() for name, p in run.optimizer.engine.parameters.items()}
    assert any(not torch.equal(start[name], moved[name]) for name in start)
    run = trainer(harmful, tmp_path, steps=3, resume=True)
    run.train()
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["estimators"] for row in rows] == [["es"], ["backprop"], ["backprop"]]
    assert "and is undone: the probe loss rose from" in rows[1]["decision"]
    assert rows[1]["decision"] in (tmp_path / "messages.log").read_text()

    alone = HybridOptimizer(
        tiny_model(),
        token_losses,
        schedule={"estimators": {"backprop": ADAMW}, "schedule": {"type": "single", "estimator": "backprop"}},
    )
    for _ in range(2):
        alone.step(token_batch())
    for name, weights in alone.engine.parameters.items():
        assert torch.equal(weights, run.optimizer.engine.parameters[name]), name


@pytest.mark.parametrize("harm", [False, True])
def test_a_resumed_run_decides_the_same(tmp_path, harm):
    chosen = (
        schedule(es={"learning_rate": 0.05}, roll_back_above=0.01, exploration=3) if harm else schedule(exploration=3)
    )
    trainer(chosen, tmp_path / "whole").train()
    whole = lines(tmp_path / "whole/metrics.jsonl")
    assert {"es", "backprop"} == {row["estimators"][0] for row in whole[3:]}
    assert any("undone" in row.get("decision", "") for row in whole[3:]) == harm
    for stop in range(0, 12, 2):
        folder = tmp_path / str(stop)
        interrupted = trainer(chosen, folder)
        interrupt_after(interrupted, step=stop)
        assert not interrupted.train().finished
        trainer(chosen, folder, resume=True).train()
        assert list(map(row_of, lines(folder / "metrics.jsonl"))) == list(map(row_of, whole))
        for name, weights in load_file(tmp_path / "whole/model/model.safetensors").items():
            assert torch.equal(weights, load_file(folder / "model/model.safetensors")[name]), name


def test_what_it_needs_is_said(tmp_path):
    with pytest.raises(UserError, match="roll_back_above: it goes back to weights in the output folder; pass output"):
        Trainer(tiny_model(), token_losses, [token_batch()], schedule=schedule(roll_back_above=1), steps=1)
    without = Trainer(tiny_model(), token_losses, [token_batch()], schedule=schedule(), steps=1, display=Silence())
    with pytest.raises(UserError, match="which nobody has told before step 0"):
        without.train()
