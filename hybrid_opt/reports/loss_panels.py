"""Panels of a run's loss against steps, seconds, tokens and forward-equivalents. Next: `mean_curves.py`.

One idea: training losses differ more from batch to batch than a step changes them, so they are drawn faint, by who acted, and the
loss on held-out rows strong above them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

from hybrid_opt.reports.content import Group, Plot, Series
from hybrid_opt.reports.keys import EVALUATION, actor_keys
from hybrid_opt.reports.records import Evaluation, Run, Step
from hybrid_opt.reports.thinning import bin_size, thinned, thinning_note
from hybrid_opt.reports.wording import known


@dataclass(frozen=True)
class Axis:
    """What a loss is drawn against: the amount that a step adds, and the total at an evaluation."""

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


def loss_group(run: Run) -> Group:
    """The four panels; one whose axis was not recorded is left out."""
    keys = actor_keys(step.actor for step in run.steps)
    size = bin_size(len(run.steps))
    panels = [_panel(run, axis, keys, size) for axis in AXES]
    legend = (*keys.values(), *([EVALUATION] if run.evaluations else []))
    return Group("", tuple(panel for panel in panels if panel), legend, _caption(run, size))


def _panel(run: Run, axis: Axis, keys, size: int) -> Plot | None:
    amounts = [axis.of_step(step) for step in run.steps]
    if not all(known(amount) for amount in amounts):
        return None
    ends = list(accumulate(amounts))
    series = [_training(run.steps, ends, actor, key, size) for actor, key in keys.items()]
    rows = [(axis.of_evaluation(row), row.measures.get("loss")) for row in run.evaluations]
    rows = [row for row in rows if all(map(known, row))]
    if rows:
        series.append(Series(EVALUATION, *(tuple(values) for values in zip(*rows, strict=True))))
    title = f"Loss against {axis.name.replace('_', '-')}"
    return Plot(f"loss_{axis.name}", title, axis.label, "loss", tuple(series), log=spans_decades(series))


def spans_decades(series: Iterable[Series]) -> bool:
    """Whether values differ so much that a logarithmic axis shows them better."""
    values = [value for line in series for value in (*line.y, *(line.low or ()))]
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def _training(steps, ends, actor: str, key, size: int) -> Series:
    own = [(end, step.loss) for end, step in zip(ends, steps, strict=True) if step.actor == actor]
    return thinned(key, [end for end, _ in own], [loss for _, loss in own], size)


def _caption(run: Run, size: int) -> str:
    strong = "the strong line joins evaluations on held-out rows" if run.evaluations else "there were no evaluations"
    return f"Faint: the loss of each step's training batch, by who acted; {strong}.{thinning_note(size)}"
