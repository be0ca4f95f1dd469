"""Panels of a run's loss or reward against steps, seconds, tokens and forward-equivalents. Next: `mean_curves.py`.

One idea: training losses differ more from batch to batch than a step changes them, so they are drawn faint, by who acted, and the
loss on held-out rows strong above them. What an estimator minimises on its own account is another quantity, so it has its own panel.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from hybrid_opt.reports.content import Group, Key, Plot, Series
from hybrid_opt.reports.keys import EVALUATION, actor_keys
from hybrid_opt.reports.records import Evaluation, Run, Step
from hybrid_opt.reports.thinning import bin_size, thinned, thinning_note
from hybrid_opt.reports.wording import known


@dataclass(frozen=True)
class Axis:
    """What a loss or reward is drawn against: the amount that a step adds, and the total at an evaluation."""

    name: str
    label: str
    of_step: Callable[[Step], float | None]
    of_evaluation: Callable[[Evaluation], float | None]


AXES = (
    Axis("steps", "steps", lambda step: 1, lambda row: row.step),
    Axis("seconds", "seconds of training", lambda step: step.seconds, lambda row: row.seconds),
    Axis("tokens", "tokens", lambda step: step.tokens, lambda row: row.tokens),
    Axis(
        "forward_equivalents",
        "forward-equivalents",
        lambda step: step.forward_equivalents,
        lambda row: row.forward_equivalents,
    ),
)


LABELS = {"loss": "loss", "reward": "reward (higher is better)"}
"""Of the vertical axis."""


def loss_group(run: Run) -> Group:
    """The four panels of the run's own objective; one whose axis was not recorded is left out."""
    keys = actor_keys(step.actor for step in run.steps if step.reached(run.goal) is not None)
    size = bin_size(len(run.steps))
    panels = [_panel(run, axis, keys, size) for axis in AXES]
    legend = (*keys.values(), *([EVALUATION] if run.evaluations else []))
    return Group("", tuple(panel for panel in panels if panel), legend, _caption(run, size))


def own_group(run: Run) -> Group | None:
    """A panel for each estimator with an objective of its own; None if there is none."""
    size = bin_size(len(run.steps))
    whose = dict.fromkeys((name, what) for step in run.steps for name, (what, _) in step.own.items())
    keys = actor_keys(name for name, _ in whose)
    panels = [
        _own_panel(run, name, what, keys[name], size, f"own_{number}") for number, (name, what) in enumerate(whose)
    ]
    caption = (
        f"Own objectives are drawn on their own training batches; only the run's is evaluated.{thinning_note(size)}"
    )
    return Group("What estimators minimise instead", tuple(panels), (), caption) if panels else None


def _own_panel(run: Run, name: str, what: str, key: Key, size: int, panel: str) -> Plot:
    points = [(step.number + 1, step.own[name][1]) for step in run.steps if name in step.own]
    series = thinned(key, *zip(*points, strict=True), size, form="line")
    log = what == "loss" and spans_decades([series])
    return Plot(panel, f"{name}: its own {what}", "steps", LABELS[what], (series,), log=log)


def title_of(goal: str, axis: Axis) -> str:
    """Such as `Loss against forward-equivalents`."""
    return f"{goal.capitalize()} against {axis.name.replace('_', '-')}"


def _panel(run: Run, axis: Axis, keys: Any, size: int) -> Plot | None:
    amounts = [axis.of_step(step) for step in run.steps]
    if not all(known(amount) for amount in amounts):
        return None
    ends = list(accumulate(amounts))
    series = [_training(run, ends, actor, key, size) for actor, key in keys.items()]
    rows = [(axis.of_evaluation(row), row.measures.get(run.goal)) for row in run.evaluations]
    rows = [row for row in rows if all(map(known, row))]
    if rows:
        series.append(Series(EVALUATION, *(tuple(values) for values in zip(*rows, strict=True))))
    log = run.goal == "loss" and spans_decades(series)
    name, title = f"{run.goal}_{axis.name}", title_of(run.goal, axis)
    return Plot(name, title, axis.label, LABELS[run.goal], tuple(series), log=log)


def spans_decades(series: Iterable[Series]) -> bool:
    """Whether values differ so much that a logarithmic axis shows them better."""
    values = [value for line in series for value in (*line.y, *(line.low or ()))]
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def _training(run: Run, ends: Any, actor: str, key: Any, size: int) -> Series:
    own = [(end, step.reached(run.goal)) for end, step in zip(ends, run.steps, strict=True) if step.actor == actor]
    return thinned(key, [end for end, _ in own], [value for _, value in own], size)


def _caption(run: Run, size: int) -> str:
    strong = "the strong line joins evaluations on held-out rows" if run.evaluations else "there were no evaluations"
    faint = "of ES the mean over its members, by who acted" if run.goal == "reward" else "by who acted"
    return f"Faint: the {run.goal} of each step's training batch, {faint}; {strong}.{thinning_note(size)}"
