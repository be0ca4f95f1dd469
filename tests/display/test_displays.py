"""What is shown of steps that evaluated nothing, of rewards, and of what estimators minimise on their own account."""

import io

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from hybrid_opt.display.dashboard_lines import dashboard_lines
from hybrid_opt.display.progress import Lines, summary_table
from hybrid_opt.display.run_so_far import Clock, RunSoFar
from hybrid_opt.run_files.curves import draw_curves
from hybrid_opt.run_files.summary import Summary, Totals, told_counts


def row(step: int, who: str, loss: float | None) -> dict:
    return {"step": step, "estimators": [who], "weights": {who: 1.0}, "loss": loss, "seconds": 2.0, "tokens": 0,
            "learning_rates": {who: 0.1}}  # fmt: skip


ROWS = [row(0, "backprop", 3.0), row(1, "stale", None), row(2, "stale", None), row(3, "backprop", 1.0)]


@pytest.mark.parametrize(("rows", "xs", "ys"), [(ROWS, [1, 4], [3.0, 1.0]), (ROWS[1:3], [], [])])
def test_curves_leave_out_steps_without_a_loss(rows, xs, ys, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    evaluations = [{"step": 0, "seconds": 0.0, "loss": 3.5}, {"step": 2, "seconds": 4.0, "loss": 2.0}]
    draw_curves(rows, evaluations, tmp_path / "curves.png")
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


# ---------------------------------------------------------------- rewards and objectives of their own


def reward_row(step: int, reward: float | None, own: float | None, **statistics: float) -> dict:
    """ES maximises the run's reward, backprop minimises a loss of its own; either may be left out."""
    losses = {"es": None if reward is None else -reward, "backprop": own}
    losses = {name: loss for name, loss in losses.items() if loss is not None}
    cost = {"forwards": 1, "backwards": 0, "forward_equivalents": 1.0, "tokens": 0, "seconds": 1.0}
    parts = {"es": {**cost, "statistics": {"reward": reward, **statistics}},
             "backprop": {**cost, "statistics": {}, "own_objective": True}}  # fmt: skip
    return {
        "step": step, "estimators": list(losses), "weights": dict.fromkeys(losses, 1.0), "loss": losses.get("es"), "reward": reward,
        "losses": losses, "learning_rates": dict.fromkeys(losses, 0.1), "tokens": 0, "seconds": 2.0, "peak_memory_bytes": 1,
        "parts": {name: parts[name] for name in losses},
    }  # fmt: skip


COUNTS = {"skipped": 0, "tied_pairs": 3, "reward_errors": 2}
REWARDS = [
    reward_row(0, None, 3.0),
    reward_row(1, 0.25, None, **COUNTS),
    reward_row(2, 0.5, 2.0, **COUNTS, finished=1.0),
    reward_row(3, 0.5, None, skipped=1, tied_pairs=4, reward_errors=0),
]


def test_curves_of_a_reward_and_of_another_loss_do_not_mix(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    evaluations = [
        {"step": 0, "seconds": 0.0, "loss": -0.125, "reward": 0.125},
        {"step": 4, "seconds": 8.0, "loss": -0.75, "reward": 0.75},
    ]
    draw_curves(REWARDS, evaluations, tmp_path / "curves.png")
    reward, reward_by_seconds, own, own_by_seconds = drawn[0].axes
    assert (reward.get_ylabel(), own.get_ylabel()) == ("reward (higher is better)", "backprop's own loss")
    assert list(reward.lines[0].get_xdata()) == [2, 3, 4]
    assert list(reward.lines[0].get_ydata()) == [0.25, 0.5, 0.5]
    assert list(reward_by_seconds.lines[1].get_xdata()) == [0.0, 8.0]
    assert list(reward.lines[1].get_ydata()) == [0.125, 0.75]
    assert (list(own.lines[0].get_xdata()), list(own.lines[0].get_ydata())) == ([1, 3], [3.0, 2.0])
    assert list(own_by_seconds.lines[0].get_xdata()) == [2.0, 6.0]


def test_lines_name_what_a_number_is_of():
    said = io.StringIO()
    shown = Lines(Console(file=said))
    for number, line in enumerate(REWARDS, 1):
        shown.stepped(line, number / 4)
    shown.evaluated(4, {"loss": -0.75, "reward": 0.75, "finished": 1.0})
    shown.evaluated(4, {"loss": -0.5, "reward": 0.75})
    assert said.getvalue().splitlines() == [
        "step 1: backprop     own loss 3.0000  lr 0.1",
        "step 2: es           reward 0.2500  lr 0.1",
        "step 3: es+backprop  reward 0.5000  own loss 2.0000  lr 0.1 0.1",
        "step 4: es           reward 0.5000  lr 0.1",
        "after 4 steps: reward 0.7500, finished 1.0000",
        "after 4 steps: loss -0.5000, reward 0.7500",  # the loss says something else
    ]


def test_the_summary_of_a_reward_shows_what_was_counted():
    shares = Totals(REWARDS).shares({"es": 0.5})
    assert shares["es"].counts == {"skipped": 1, "tied_pairs": 10, "reward_errors": 4}
    assert shares["backprop"].counts == {}
    measures = ({"loss": -0.125, "reward": 0.125}, {"loss": -0.75, "reward": 0.75})
    console = Console(file=io.StringIO(), width=90)
    console.print(summary_table(Summary(4, *measures, goal="reward", estimators=shares)))
    shown = console.file.getvalue()
    assert "4 steps: reward 0.125 -> 0.75\n" in shown.replace("  ", "")
    assert "loss" not in shown
    assert "reward gain" in shown
    assert "+0.5000" in shown
    told = "1 of 3 steps skipped, as all members were equally good or too many not finite; 10 pairs tied; 4 rewards that went wrong"
    assert f"es: {told}" in " ".join(shown.split())
    assert told_counts(3, {"tied_pairs": 1, "reward_errors": 0}) == "1 pair tied"


def test_the_dashboard_of_a_reward():
    run = RunSoFar()
    for line in REWARDS:
        run.add(line)
    assert run.course.points == [0.25, 0.5, 0.5]
    lines = [line.plain for line in dashboard_lines(run, Clock(0.0, fresh=True), 1.0, 110, 30)]
    assert any(line.startswith("reward      0.5000") for line in lines)
    header, backprop, es = lines[next(i for i, line in enumerate(lines) if line.startswith("estimator")) :][:3]
    titles = "estimator steps forwards backwards seconds lr loss reward finished skipped ties errors"
    assert header.split() == titles.split()
    assert backprop.split() == ["■", "backprop", "2", "2", "0", "2.0", "0.1", "2.0000"]
    assert es.split() == ["■", "es", "3", "3", "0", "3.0", "0.1", "0.5000", "1", "1", "10", "4"]


def test_functions_of_one_name_have_columns_of_their_own():
    run = RunSoFar()
    run.add(reward_row(0, 0.5, 1.0, **{"a:fits": 0.25, "b:fits": 0.75, "b:steps": 0.125, "a:is_ok": 1.0}))
    lines = [line.plain for line in dashboard_lines(run, Clock(0.0, fresh=True), 1.0, 160, 30)]
    (header,) = (line for line in lines if line.startswith("estimator"))
    assert {"steps", "a:fits", "b:fits", "b:steps", "is", "ok"} < set(header.split())
