"""The picture of a run: loss or reward against steps and against seconds, coloured by who acted. Next: nothing; this is the end.

One idea: what estimators minimise on their own account is another quantity than the run's objective, so it has a row of its own.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybrid_opt.training.goal import goal_of, own_losses

Row = dict[str, Any]


def draw_curves(metrics: list[Row], evaluations: list[Row], path: Path) -> None:
    """Write the picture.

    Args:
        metrics: lines of `metrics.jsonl`; steps without a loss leave no mark.
        evaluations: lines of `evaluations.jsonl`.
    """
    own = list(dict.fromkeys((name, what) for row in metrics for name, (what, _) in own_losses(row).items()))
    figure = Figure(figsize=(11, 4.2 + 2.6 * len(own)), layout="constrained")
    heights = [4.2, *[2.6] * len(own)]
    rows = figure.subplots(len(heights), 2, squeeze=False, sharey="row", sharex="col", height_ratios=heights)
    seconds = list(accumulate(row["seconds"] for row in metrics))
    for column, (unit, ends) in enumerate((("step", [row["step"] + 1 for row in metrics]), ("seconds", seconds))):
        _draw_goal(rows[0][column], metrics, evaluations, ends)
        for axes, (name, what) in zip(rows[1:], own, strict=True):
            _draw_own(axes[column], metrics, ends, name, what)
        rows[-1][column].set_xlabel(unit)
    for axes in rows:
        if axes[0].get_legend_handles_labels()[0]:
            axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=130)


def _draw_goal(ax: Axes, metrics: Sequence[Row], evaluations: Sequence[Row], ends: Sequence[float]) -> None:
    """The run's own objective in training and on held-out rows; `ends` are where the steps end."""
    goal = goal_of(metrics[0]) if metrics else "loss"
    points = [(x, row[goal], _who(row)) for x, row in zip(ends, metrics, strict=True) if row[goal] is not None]
    ax.plot([x for x, _, _ in points], [y for _, y, _ in points], color="0.85", linewidth=1, zorder=1)
    for number, actor in enumerate(dict.fromkeys(who for _, _, who in points)):
        own = [(x, y) for x, y, who in points if who == actor]
        ax.scatter(*zip(*own, strict=True), s=16, color=f"C{number}", label=f"training, {actor}", zorder=2)
    if evaluations:
        rows = [row for row in evaluations if row["step"] <= len(ends)]
        # An evaluation of step s was made after s steps, so it lies at the end of the step before.
        at = [0.0 if row["step"] == 0 else ends[row["step"] - 1] for row in rows]
        style = {"color": "black", "marker": "D", "markersize": 4, "linewidth": 1.2, "label": "validation"}
        ax.plot(at, [row[goal] for row in rows], **style, zorder=3)
    _finish(ax, "reward (higher is better)" if goal == "reward" else "loss")


def _draw_own(ax: Axes, metrics: Sequence[Row], ends: Sequence[float], name: str, what: str) -> None:
    """What an estimator makes of its own objective."""
    found = [(x, own_losses(row).get(name)) for x, row in zip(ends, metrics, strict=True)]
    points = [(x, value[1]) for x, value in found if value]
    ax.plot(*zip(*points, strict=True), color="0.4", marker="o", markersize=3.5, linewidth=0.8)
    _finish(ax, f"{name}'s own {what}")


def _finish(ax: Axes, label: str) -> None:
    if ax.get_subplotspec().is_first_col():
        ax.set_ylabel(label)
    ax.grid(alpha=0.3)


def _who(row: Row) -> str:
    return " + ".join(row["estimators"])
