"""The picture of a run: loss or reward against steps and against seconds, coloured by who acted. Next: nothing; this is the end.

One idea: what estimators minimise on their own account is another quantity than the run's objective, so it has a row of its own.
Lines are read once, one at a time, and of many points means are kept, so a picture takes as much memory whatever the run's length.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybrid_opt.display.run_so_far import Curve
from hybrid_opt.run_files.durable import write_atomically
from hybrid_opt.training.goal import goal_of, own_losses

Row = dict[str, Any]


class Course:
    """Values with the steps and the seconds at which they were reached."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.values = Curve(), Curve(), Curve()

    def add(self, step: int, seconds: float, value: float) -> None:
        """One more value."""
        for curve, part in ((self.steps, step), (self.seconds, seconds), (self.values, value)):
            curve.add(part)

    def against(self, unit: str) -> tuple[list[float], list[float]]:
        """Where the points are on the axis of `step` or `seconds`, and how high."""
        return (self.steps if unit == "step" else self.seconds).means(), self.values.means()

    def label(self, text: str) -> str:
        """The text, and how many values a point stands for, if that is not one."""
        return text if self.values.each == 1 else f"{text} (means of {self.values.each})"


class _Courses:
    """All that is drawn.

    Args:
        metrics: lines of `metrics.jsonl`; steps without a loss leave no mark.
        evaluations: lines of `evaluations.jsonl`.
    """

    def __init__(self, metrics: Iterable[Row], evaluations: Iterable[Row]) -> None:
        self.goal = "loss"
        self.whole, self.validation = Course(), Course()
        self.of_actors: dict[str, Course] = {}
        self.own: dict[tuple[str, str], Course] = {}
        seconds = 0.0
        for row in metrics:
            self.goal, seconds = goal_of(row), seconds + row["seconds"]
            self._add(row, row["step"] + 1, seconds)
        for row in evaluations:  # made after so many steps, and so at the end of the one before
            self.validation.add(row["step"], row["seconds"], row[self.goal])

    def _add(self, row: Row, step: int, seconds: float) -> None:
        if (value := row[self.goal]) is not None:
            for course in (self.whole, self.of_actors.setdefault(" + ".join(row["estimators"]), Course())):
                course.add(step, seconds, value)
        for name, (what, value) in own_losses(row).items():
            self.own.setdefault((name, what), Course()).add(step, seconds, value)


def draw_curves(metrics: Iterable[Row], evaluations: Iterable[Row], path: Path) -> None:
    """Write the picture; for the lines see `_Courses`.

    Raises:
        CannotWriteError: the operating system refused.
    """
    found = _Courses(metrics, evaluations)
    heights = [4.2, *[2.6] * len(found.own)]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    rows = figure.subplots(len(heights), 2, squeeze=False, sharey="row", sharex="col", height_ratios=heights)
    for column, unit in enumerate(("step", "seconds")):
        _draw_goal(rows[0][column], found, unit)
        for axes, ((name, what), course) in zip(rows[1:], found.own.items(), strict=True):
            style = {"color": "0.4", "marker": "o", "markersize": 3.5, "linewidth": 0.8}
            axes[column].plot(*course.against(unit), **style)
            _finish(axes[column], course.label(f"{name}'s own {what}"))
        rows[-1][column].set_xlabel(unit)
    for axes in rows:
        if axes[0].get_legend_handles_labels()[0]:
            axes[0].legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_atomically(path, picture.getvalue())


def _draw_goal(ax: Axes, found: _Courses, unit: str) -> None:
    """The run's own objective in training and on held-out rows."""
    ax.plot(*found.whole.against(unit), color="0.85", linewidth=1, zorder=1)
    for number, (actor, course) in enumerate(found.of_actors.items()):
        ax.scatter(*course.against(unit), s=16, color=f"C{number}", label=course.label(f"training, {actor}"), zorder=2)
    if found.validation.values.means():
        style = {"color": "black", "marker": "D", "markersize": 4, "linewidth": 1.2, "zorder": 3}
        ax.plot(*found.validation.against(unit), **style, label=found.validation.label("validation"))
    _finish(ax, "reward (higher is better)" if found.goal == "reward" else "loss")


def _finish(ax: Axes, label: str) -> None:
    if ax.get_subplotspec().is_first_col():
        ax.set_ylabel(label)
    ax.grid(alpha=0.3)
