"""What must not grow with the number of steps: memory, open files, lines on a console, points of a picture."""

import gc
import io
import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from hybrid_opt import Trainer
from hybrid_opt.display.progress import Lines
from hybrid_opt.display.run_so_far import POINTS
from hybrid_opt.machine.memory import present_memory_bytes
from hybrid_opt.run_files.curves import draw_curves

CPU = torch.device("cpu")
ES = {"type": "es", "population_size": 2, "sigma": 0.01, "learning_rate": 1e-4, "fitness_shaping": "none"}
ALTERNATE = {
    "estimators": {"es": ES, "backprop": {"type": "backprop", "learning_rate": 1e-4}},
    "schedule": {"type": "alternate", "pattern": {"es": 1, "backprop": 1}},
}


def small_trainer(output: Path, steps: int, *, width: int = 16, **options) -> Trainer:
    """A perceptron of 212 weights, or wider."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.Tanh(), torch.nn.Linear(width, 4))
    rows = torch.linspace(-1, 1, 64).view(8, 8)
    return Trainer(
        model, lambda model, batch: model(batch).square().mean(1), [rows], schedule=ALTERNATE, steps=steps, output=output,
        validation=[rows], **options,
    )  # fmt: skip


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def test_2000_steps_take_no_more_memory_and_files_than_500(tmp_path):
    """Rows that are kept would take 5 MB in 1,500 steps."""
    said = io.StringIO()
    display = Lines(Console(file=said))
    trainer = small_trainer(tmp_path / "out", 2000, evaluate_every=20, checkpoint_every=500, display=display)
    take_step, seen = trainer.optimizer.step, []

    def step(*batches):
        if trainer.optimizer.signals.step in (500, 1999):
            gc.collect()
            seen.append((present_memory_bytes(CPU) or 0, open_files(), len(said.getvalue().splitlines())))
        return take_step(*batches)

    trainer.optimizer.step = step
    summary = trainer.train()
    (resident, files, lines), (resident_later, files_later, lines_later) = seen
    assert resident_later - resident < 2e6
    assert files_later == files
    assert lines_later - lines == 7 + 74  # each tenth of the run; the evaluations at 520 to 1,980 steps
    assert {name: share.steps for name, share in summary.estimators.items()} == {"es": 1000, "backprop": 1000}
    written = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == list(range(2000))
    assert sum(share.seconds for share in summary.estimators.values()) == pytest.approx(summary.seconds)


def test_of_many_evaluations_few_are_told_and_the_last_one_always():
    said = io.StringIO()
    shown = Lines(Console(file=said))
    for number in range(1, 12_346):
        if number == 12_345:
            shown.stepped({"step": 12_344, "loss": None, "tokens": 0, "weights": {}, "learning_rates": {}}, 1.0)
        shown.evaluated(number, {"loss": 1.0})
    told = [int(line.split()[1]) for line in said.getvalue().splitlines() if line.startswith("after")]
    assert told[:99] == list(range(1, 100))
    assert told[99:101] == [100, 110]
    assert told[-3:] == [11_000, 12_000, 12_345]
    assert len(told) == 99 + 90 + 90 + 3 + 1


def test_a_picture_of_many_steps_has_few_points_and_they_are_means(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    rows = ({"step": i, "seconds": 0.5, "loss": float(i), "estimators": ["es"]} for i in range(100_000))
    draw_curves(rows, [], tmp_path / "curves.png")
    steps, seconds = drawn[0].axes
    (points,) = steps.collections
    x, y = points.get_offsets().T
    assert len(x) < POINTS
    assert points.get_label() == "training, es (means of 256)"
    assert (x[0], y[0]) == (128.5, 127.5)  # of steps 1 to 256, which had losses 0 to 255
    assert all(after - before == 256 for before, after in pairwise(y[:-1]))
    assert x[-1] == (390 * 256 + 1 + 100_000) / 2  # what remains
    assert seconds.collections[0].get_offsets()[0, 0] == 64.25
