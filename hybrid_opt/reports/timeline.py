"""Panels of who acted when. Next: `loss_panels.py`.

One idea: a lane for each estimator, as high as its weight. Of many steps a bin shows the mean weight, so that a lane at a quarter
of its height is an estimator that acts in every fourth step, or in every step with a quarter of the weight.
"""

from collections.abc import Iterable
from typing import Any

from hybrid_opt.reports.content import Group, Lane, Timeline
from hybrid_opt.reports.keys import actor_keys, arm_keys
from hybrid_opt.reports.records import Run, Step
from hybrid_opt.reports.thinning import bin_size, bins_of

BINS = 300
"""Bars of a lane at most; a third of it where many lanes share a panel."""


def timeline_of_run(run: Run) -> Group:
    """Who acted in each step of a run."""
    keys = actor_keys(name for step in run.steps for name in step.weights)
    lanes = tuple(_lane(run.steps, name, key.label, key) for name, key in keys.items())
    return Group("", (Timeline("timeline", "Who acted", lanes),), (), _caption(len(run.steps)))


def timeline_of_arms(runs: dict[str, Run], reference: str | None, arms: Iterable[str], name: str) -> Timeline:
    """Who acted in one run of each arm; lanes are named by the arm's number and the estimator."""
    numbers = {arm: key.number for arm, key in arm_keys(arms, reference).items()}
    lanes = []
    for arm, run in runs.items():
        keys = actor_keys(name for step in run.steps for name in step.weights)
        lanes += [_lane(run.steps, name, f"{numbers[arm]}  {name}", key, BINS // 3) for name, key in keys.items()]
    return Timeline(name, "Who acted", tuple(lanes))


def _lane(steps: tuple[Step, ...], name: str, label: str, key: Any, bins: int = BINS) -> Lane:
    size = bin_size(len(steps), most=bins)
    bins = bins_of(steps, size)
    weights = [sum(abs(step.weights.get(name, 0.0)) for step in part) / len(part) for part in bins]
    edges = [float(part[0].number) for part in bins] + [steps[-1].number + 1.0]
    most = max((abs(step.weights.get(name, 0.0)) for step in steps), default=0.0)
    # Learning rates say how large a weight is in effect, so a lane is compared with its own largest weight only.
    return _joined(Lane(label, key, tuple(edges), tuple(weight / most if most else 0.0 for weight in weights)))


def _joined(lane: Lane) -> Lane:
    """Neighbours of the same weight as one bar."""
    starts = [i for i, weight in enumerate(lane.weights) if i == 0 or weight != lane.weights[i - 1]]
    edges = (*(lane.edges[i] for i in starts), lane.edges[-1])
    return Lane(lane.label, lane.key, edges, tuple(lane.weights[i] for i in starts))


def _caption(steps: int) -> str:
    size = bin_size(steps, most=BINS)
    means = "" if size == 1 else f" Each bar is the mean of {size:,} steps."
    return f"The height of a bar is the estimator's weight, in parts of its largest.{means}"
