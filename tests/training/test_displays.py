"""What is shown of steps that evaluated nothing."""

import io

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from hybrid_opt.training.curves import draw_curves
from hybrid_opt.training.dashboard_lines import dashboard_lines
from hybrid_opt.training.progress import Lines
from hybrid_opt.training.run_so_far import Clock, RunSoFar


def row(step: int, who: str, loss: float | None) -> dict:
    return {"step": step, "estimators": [who], "weights": {who: 1.0}, "loss": loss, "seconds": 2.0, "tokens": 0,
            "learning_rates": {who: 0.1}}  # fmt: skip


ROWS = [row(0, "backprop", 3.0), row(1, "stale", None), row(2, "stale", None), row(3, "backprop", 1.0)]


@pytest.mark.parametrize(("rows", "xs", "ys"), [(ROWS, [1, 4], [3.0, 1.0]), (ROWS[1:3], [], [])])
def test_curves_leave_out_steps_without_a_loss(rows, xs, ys, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    draw_curves(rows, [{"step": 0, "loss": 3.5}, {"step": 2, "loss": 2.0}], tmp_path / "curves.png")
    (steps, seconds) = drawn[0].axes
    training, validation = steps.lines
    assert (list(training.get_xdata()), list(training.get_ydata())) == (xs, ys)
    assert list(seconds.lines[0].get_xdata()) == [2.0 * x for x in xs]
    assert list(seconds.lines[1].get_xdata()) == [0.0, 4.0]
    assert list(validation.get_ydata()) == [3.5, 2.0]


def test_curves_of_such_steps_alone_can_be_written(tmp_path):
    draw_curves(ROWS[1:3], [], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_line_of_progress_without_a_loss():
    said = io.StringIO()
    shown = Lines(Console(file=said))
    shown.start(0, 2)
    shown.stepped(ROWS[0], 0.5)
    shown.stepped(ROWS[1], 1.0)
    shown.stop()
    assert said.getvalue().splitlines() == ["step 1: backprop     loss 3.0000  lr 0.1", "step 2: stale        lr 0.1"]


def test_the_dashboards_numbers_leave_such_steps_out():
    run = RunSoFar()
    for number in (1, 2, 3):
        part = {
            "forwards": 0,
            "backwards": 0,
            "forward_equivalents": 0.0,
            "tokens": 0,
            "seconds": 2.0,
            "statistics": {},
        }
        who = ROWS[number]["estimators"][0]
        run.add({**ROWS[number], "peak_memory_bytes": 1, "losses": {who: ROWS[number]["loss"]}, "parts": {who: part}})
        assert dashboard_lines(run, Clock(0.0, fresh=True), 1.0, 100, 30)
    assert run.course.points == [1.0]
    assert run.smoothed == pytest.approx(1.0)
