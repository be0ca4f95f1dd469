"""What the schedule is told in a run, and that a run that goes on decides as if it had never stopped."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hybrid_opt.display.progress import Silence
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from hybrid_opt.training.trainer import Trainer
from tests.conftest import interrupt_after, tiny_model, token_batch, token_losses
from tests.training.test_trainer import lines

ES = {"type": "es", "population_size": 8, "learning_rate": 1e-2, "fitness_shaping": "none", "sigma": 1e-3}
ADAMW = {"type": "backprop", "learning_rate": 1e-2}


def phased(*phases) -> dict:
    schedules = [
        {**phase, "schedule": {"type": "single", "estimator": name}}
        for phase, name in zip(phases, ("es", "backprop"), strict=True)
    ]
    return {"estimators": {"es": ES, "backprop": ADAMW}, "schedule": {"type": "phases", "phases": schedules}}


def trainer(schedule, folder, steps, **more) -> Trainer:
    batch = token_batch()
    return Trainer(
        tiny_model(),
        token_losses,
        [batch],
        schedule=schedule,
        steps=steps,
        output=folder,
        validation=[batch],
        evaluate_every=2,
        probe=[batch],
        display=Silence(),
        **more,
    )


def test_signals_of_steps_evaluations_turns_and_memory(tmp_path):
    schedule = phased({"steps": 22}, {"steps": 3, "then": 0})
    trained = trainer(schedule, tmp_path, 27)
    trained.train()
    rows = lines(tmp_path / "metrics.jsonl")
    slopes = [row["signals"].get("loss_slope") for row in rows]
    assert slopes[:19] == [None] * 19
    expected = torch.linalg.lstsq(
        torch.tensor([[1.0, float(step)] for step in range(20)], dtype=torch.float64),
        torch.tensor([[row["loss"]] for row in rows[:20]], dtype=torch.float64),
    ).solution[1]
    assert slopes[19] == pytest.approx(expected.item(), rel=1e-6)
    assert all(row["signals"]["free_memory_bytes"] > 1e6 for row in rows)

    # The turn of es ends with step 22, whose probe the evaluation on the same rows before it has also measured.
    told = rows[22]["signals"]
    loss = {row["step"]: row["loss"] for row in lines(tmp_path / "evaluations.jsonl")}
    seconds = sum(row["seconds"] for row in rows[:22])
    assert told["es.loss_decrease_per_second"] == pytest.approx((loss[0] - loss[22]) / seconds, rel=1e-5)
    equivalents = sum(row["forward_equivalents"] for row in rows[:22])
    assert told["es.loss_decrease_per_forward_equivalent"] == pytest.approx(
        (loss[0] - loss[22]) / equivalents, rel=1e-5
    )
    assert [row["step"] for row in rows if "decision" in row] == [22, 25]
    assert rows[22]["decision"] == "phase 1 after 22 steps"
    assert "backprop.loss_decrease_per_second" in rows[25]["signals"]

    signals = trained.optimizer.signals
    snr = rows[26]["parts"]["es"]["statistics"]["snr"]
    assert signals.measured["es.snr"] == snr
    assert signals.measured["es.pair_correlation"] == pytest.approx((1 - snr) / (1 + snr))
    assert signals.measured["es.loss"] == rows[26]["loss"]
    assert signals.measured["peak_memory_bytes"] >= rows[26]["peak_memory_bytes"]


def test_a_trigger_by_the_validation_loss(tmp_path):
    """It is met at the evaluation after step 4 or later, by the run's own file."""
    trigger = {"until": {"signal": "validation_loss", "below": 4.1}, "at_most": 40}
    trainer(phased(trigger, {}), tmp_path, 44).train()
    rows = lines(tmp_path / "metrics.jsonl")
    losses = {row["step"]: row["loss"] for row in lines(tmp_path / "evaluations.jsonl")}
    first = next(row["step"] for row in rows if row["estimators"] == ["backprop"])
    assert first == next(step for step, loss in losses.items() if loss < 4.1)
    assert 0 < first < 40
    assert f"(now {losses[first]:.4g})" in rows[first]["decision"]


def test_a_resumed_run_decides_the_same(tmp_path):
    """Stopped at each of many steps: before, at and after a decision, with part of a row of measurements seen."""
    phases = (
        {"until": {"signal": "es.loss", "below": 4.12, "for": 3}, "at_least": 4, "cool_down": 6},
        {"until": {"signal": "backwards", "above": 1}, "then": 0},
    )
    trainer(phased(*phases), tmp_path / "whole", 16).train()
    whole = lines(tmp_path / "whole/metrics.jsonl")
    decisions = [row["step"] for row in whole if "decision" in row]
    assert len(decisions) >= 3
    for stop in range(2, 14, 2):
        folder = tmp_path / str(stop)
        interrupted = trainer(phased(*phases), folder, 16)
        interrupt_after(interrupted, step=stop)
        assert not interrupted.train().finished
        trainer(phased(*phases), folder, 16, resume=True).train()
        again = lines(folder / "metrics.jsonl")
        assert [(row["estimators"], row["loss"], row.get("decision")) for row in again] == [
            (row["estimators"], row["loss"], row.get("decision")) for row in whole
        ]
        for name, weights in load_file(tmp_path / "whole/model/model.safetensors").items():
            assert torch.equal(weights, load_file(folder / "model/model.safetensors")[name]), name


def test_a_loop_of_ones_own_tells_what_it_measures():
    optimizer = HybridOptimizer(
        tiny_model(), token_losses, schedule=phased({"until": {"signal": "validation_loss", "above": 1}}, {})
    )
    optimizer.step(token_batch())
    optimizer.tell({"validation_loss": 0.5})
    assert optimizer.acting() == ["es"]
    optimizer.step(token_batch())
    optimizer.tell({"validation_loss": 1.5})
    assert optimizer.acting() == ["backprop"]
    report = optimizer.step(token_batch())
    assert report.decision == "phase 1 after validation_loss above 1 (now 1.5)"
    assert json.dumps(optimizer.state_dict()["signals"])
