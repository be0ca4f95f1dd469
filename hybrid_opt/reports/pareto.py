"""Panels of loss or reward against peak memory and against seconds, with the front. Next: `ablation_table.py`.

One idea: an arm is on the front if no other is as good in both and better in one, as `summary.csv` says. Arms on it are filled, the
others hollow.
"""

from typing import Any

from hybrid_opt.reports.content import Group, Key, Plot, Series
from hybrid_opt.reports.keys import arm_keys
from hybrid_opt.reports.loss_panels import LABELS
from hybrid_opt.reports.records import Study
from hybrid_opt.reports.wording import known

FRONT = Key("front", "muted", dash="--")
COSTS = (
    ("memory", "peak_memory_bytes", "peak memory in MB", "peak memory", 1e-6),
    ("seconds", "seconds", "seconds of training", "seconds", 1.0),
)


def pareto_group(study: Study, task: str, budget: str, name: str) -> Group:
    """Two panels; one without any arm is left out."""
    keys, rows = arm_keys(study.arms, study.reference), study.summary_of(task, budget)
    goal = study.goal_of(task, budget)
    panels = [_panel(rows, keys, goal, f"{name}_{cost[0]}", *cost) for cost in COSTS]
    panels = tuple(panel for panel in panels if panel.series)
    drawn = {series.key for panel in panels for series in panel.series}
    return Group(f"{task}, {budget}", panels, tuple(key for key in (*keys.values(), FRONT) if key in drawn))


def _panel(
    rows: Any, keys: Any, goal: str, name: str, cost: str, column: str, label: str, against: str, scale: float
) -> Plot:
    points, front = [], []
    for arm, key in keys.items():
        row = rows.get(arm, {})
        x, y = row.get(column), row.get(goal)
        if not (known(x) and known(y)):
            continue
        on_front = bool(row.get(f"pareto_{cost}"))
        bar = [(row[end],) if known(row.get(end)) else None for end in (f"{goal}_low", f"{goal}_high")]
        points.append(Series(key, (x * scale,), (y,), *bar, form="solid" if on_front else "hollow"))
        front += [(x * scale, y)] * on_front
    if front:
        points.insert(0, Series(FRONT, *(tuple(values) for values in zip(*sorted(front), strict=True)), form="front"))
    return Plot(name, f"{goal.capitalize()} against {against}", label, LABELS[goal], tuple(points))
