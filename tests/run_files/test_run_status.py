"""How a run stands, seen from outside: alive, finished, stopped, killed."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest

from hybrid_opt.display.progress import Silence
from hybrid_opt.errors import UserError
from hybrid_opt.run_files.presence import is_alive, present, process_of
from hybrid_opt.run_files.run_status import status_lines
from hybrid_opt.training.trainer import Trainer
from tests.conftest import interrupt_after, tiny_model, token_batch, token_losses
from tests.training.test_trainer import lines

ES = {"type": "es", "population_size": 4, "learning_rate": 1e-2, "fitness_shaping": "none"}
SCHEDULE = {"estimators": {"es": ES}, "schedule": {"type": "single", "estimator": "es"}}


def trainer(folder, losses=token_losses, **more) -> Trainer:
    options = {"steps": 30, "validation": [token_batch()], "evaluate_every": 4, "checkpoint_every": 5, **more}
    return Trainer(
        tiny_model(), losses, [token_batch()], schedule=SCHEDULE, output=folder, display=Silence(), **options
    )


def told(folder) -> dict[str, str]:
    return {word: text for word, text in status_lines(folder) if word}


def test_a_finished_run(tmp_path):
    trainer(tmp_path).train()
    found = told(tmp_path)
    rows, evaluations = lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "evaluations.jsonl")
    assert found["run"] == "finished after 30 steps"
    assert re.fullmatch(
        rf"30 of 30 \(100% of the run\), loss {rows[-1]['loss']:.4g}, the latest [\d.]+ s ago", found["step"]
    )
    assert found["rate"] == f"{sum(row['seconds'] for row in rows[-20:]) / 20:.3g} s a step, over the latest 20"
    assert found["evaluated"] == f"after step 30: loss {evaluations[-1]['loss']:.4g}"
    assert "end" not in found
    assert "saved" not in found


def test_a_stopped_run_and_what_it_said(tmp_path):
    def losses(model, batch):
        warnings.warn("something about\nthis batch", RuntimeWarning, stacklevel=1)
        return token_losses(model, batch)

    interrupted = trainer(tmp_path, losses)
    interrupt_after(interrupted, step=7)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("default")
        interrupted.train()
    found = told(tmp_path)
    assert found["run"] == "not running; the command with --resume goes on"
    assert found["step"].startswith("8 of 30 (27% of the run)")
    assert re.fullmatch(r"after step 8, [\d.]+ s ago, by the ledger", found["saved"])
    said = (tmp_path / "messages.log").read_text().splitlines()
    assert [line.partition(" ")[2] for line in said] == [
        "warning: something about this batch",
        "stopping after the current step or evaluation, and saving; Ctrl-C again stops at once",
        f"stopped after 8 steps (saved in {tmp_path}; go on with the same command and --resume)",
    ]
    assert all(re.match(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in said)
    assert found["said"] == said[-3]


def test_a_run_that_ends_by_an_error_says_so(tmp_path):
    def losses(model, batch):
        raise UserError("the data is no good")

    with pytest.raises(UserError):
        trainer(tmp_path, losses, validation=(), evaluate_every=0).train()
    assert "ended by UserError: step 0, estimator es: the data is no good" in told(tmp_path)["said"]


def _train_slowly(folder):
    def losses(model, batch):
        time.sleep(0.01)
        return token_losses(model, batch)

    trainer(folder, losses, steps=10_000).train()


def test_a_run_that_is_alive_and_is_killed(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_train_slowly, args=(tmp_path,))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "metrics.jsonl").exists() or len(lines(tmp_path / "metrics.jsonl")) < 8:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found = told(tmp_path)
        assert re.match(rf"alive: process {process.pid} on \S+, for [\d.]+ s$", found["run"])
        assert re.match(r"in about [\d.]+ (s|min|h), at 20\d\d-\d\d-\d\d \d\d:\d\d$", found["end"])
        assert re.match(r"after step \d+, [\d.]+ s ago$", found["saved"])
        with pytest.raises(
            UserError, match=rf"is being written by process {process.pid} on .*; wait for it or stop it"
        ):
            trainer(tmp_path, overwrite=True).train()
        assert len(lines(tmp_path / "metrics.jsonl")) >= 8
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    found = told(tmp_path)
    assert found["run"] == "not running; the command with --resume goes on"
    assert "end" not in found


def test_the_end_is_estimated_from_what_this_process_has_done(tmp_path, monkeypatch):
    """20 of 100 steps were there when it began; it has taken 30 in 60 seconds, so the other 50 take 100."""
    row = {"loss": 1.0, "seconds": 1.5, "tokens": 10, "forward_equivalents": 2}
    row |= {"weights": {"es": 1.0}, "parts": {}, "peak_memory_bytes": 0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": n, **row}) + "\n" for n in range(50)))
    with present(tmp_path, {"step": 20, "steps": 100, "budget": None}):
        began = process_of(tmp_path)["began"]
        monkeypatch.setattr(time, "time", lambda: began + 60)
        assert told(tmp_path)["end"].startswith("in about 100 s, at ")
        assert is_alive(tmp_path)
    assert not is_alive(tmp_path)
    with present(
        tmp_path, {"step": 20, "steps": None, "budget": {"seconds": 150}}
    ):  # 30 of 150 s, now 75: 45 in 60, 75 left
        began = process_of(tmp_path)["began"]
        monkeypatch.setattr(time, "time", lambda: began + 60)
        assert told(tmp_path)["end"].startswith("in about 100 s, at ")


def test_the_command_and_folders_that_are_no_run(tmp_path):
    command = [sys.executable, "-m", "hybrid_opt", "status"]
    trainer(tmp_path / "run", steps=2).train()
    done = subprocess.run([*command, tmp_path / "run"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("run        finished after 2 steps\nstep       2 of 2 (100% of the run)")
    for folder in (tmp_path, tmp_path / "nothing", tmp_path / "run/metrics.jsonl"):
        with pytest.raises(UserError, match="holds no run; name the output folder"):
            told(folder)
    (tmp_path / "run/metrics.jsonl").write_text("{]\n{}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1: not JSON"):
        told(tmp_path / "run")
