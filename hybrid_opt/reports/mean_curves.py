"""Panels of the arms' evaluation loss or reward, mean over seeds with interval. Next: `pareto.py`.

One idea: seeds are averaged only where all of them have been. Where they were evaluated at the same places the mean is taken there;
otherwise each is interpolated linearly onto a common grid within the range that all have.
"""

from collections.abc import Sequence

import numpy as np

from hybrid_opt.reports.content import Group, Key, Plot, Series
from hybrid_opt.reports.keys import arm_keys
from hybrid_opt.reports.loss_panels import AXES, LABELS, Axis, spans_decades, title_of
from hybrid_opt.reports.records import Study, StudyRun
from hybrid_opt.reports.wording import known
from hybrid_opt.studies.results import interval

GRID = 60
"""Points of the common grid."""

Curve = tuple[tuple[float, ...], tuple[float, ...]]


def curves_group(study: Study, task: str, budget: str, name: str) -> Group:
    """Four panels with a line for each arm that has evaluations."""
    keys, goal = arm_keys(study.arms, study.reference), study.goal_of(task, budget)
    panels = [_panel(study, task, budget, axis, keys, goal, f"{name}_{axis.name}") for axis in AXES]
    panels = [panel for panel in panels if panel.series]
    drawn = {series.key for panel in panels for series in panel.series}
    legend = tuple(key for key in keys.values() if key in drawn)
    return Group(f"{task}, {budget}", tuple(panels), legend)


def _panel(study: Study, task: str, budget: str, axis: Axis, keys: dict[str, Key], goal: str, name: str) -> Plot:
    lines = ((key, _curves(study.runs_of(task, budget, arm), axis, goal)) for arm, key in keys.items())
    series = tuple(line for key, curves in lines if (line := mean_curve(key, curves)))
    log = goal == "loss" and spans_decades(Series(line.key, line.x, line.y) for line in series)
    return Plot(name, title_of(goal, axis), axis.label, f"evaluation {LABELS[goal]}", series, log=log)


def _curves(runs: Sequence[StudyRun], axis: Axis, goal: str) -> list[Curve]:
    """A curve for each finished run; while there is none, for each that was interrupted."""
    chosen = [run for run in runs if run.status == "finished"] or [run for run in runs if run.status == "interrupted"]
    curves = []
    for run in chosen:
        rows = sorted({axis.of_evaluation(row): row.measures.get(goal) for row in run.evaluations}.items(), key=_place)
        rows = [row for row in rows if all(map(known, row))]
        if rows:
            curves.append(tuple(zip(*rows, strict=True)))
    return curves


def _place(row: tuple[float | None, float | None]) -> float:
    return row[0] if known(row[0]) else 0.0


def mean_curve(key: Key, curves: Sequence[Curve]) -> Series | None:
    """The mean of some curves with its interval; None if they have no range in common."""
    if not curves:
        return None
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if start > end:
        return None
    same = all(x == curves[0][0] for x, _ in curves)
    grid = curves[0][0] if same else tuple(float(at) for at in np.linspace(start, end, GRID))
    columns = zip(*(np.interp(grid, x, y).tolist() for x, y in curves), strict=True)
    mean, low, high = zip(*(interval(values) for values in columns), strict=True)
    return Series(key, grid, mean, *((None, None) if low[0] is None else (low, high)))
