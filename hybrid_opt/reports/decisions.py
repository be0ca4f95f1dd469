"""What a schedule decided by signals, and why. Next: `memory_panels.py`.

One idea: the panels show what was weighed, each at the step where it was, and the table says it in words.
"""

from collections.abc import Iterator

from hybrid_opt.reports.content import Column, Group, Plot, Section, Table
from hybrid_opt.reports.keys import actor_keys
from hybrid_opt.reports.records import Run
from hybrid_opt.reports.thinning import bin_size, thinned
from hybrid_opt.reports.wording import count

MOST = 60
"""Decisions in the table; of more the latest."""
WEIGHED = {
    "rate": ("What each estimator brought", "fall of the probe loss for what it took"),
    "index": ("What decided: the same with what is to be explored", "index"),
}
CAPTION = (
    "A point stands at the step before which it was weighed. The rate is a discounted mean over an estimator's blocks; the next block went to the "
    "highest index."
)


def decision_sections(run: Run) -> Iterator[Section]:
    """Nothing for a run that decided nothing."""
    decided = [step for step in run.steps if step.decision]
    if not decided:
        return
    rows = tuple({"step": step.number, "decision": step.decision} for step in decided[-MOST:])
    notes = (f"The latest {MOST} of {count(len(decided))}.",) if len(decided) > MOST else ()
    columns = (Column("step", "before step", count), Column("decision", "decision", numeric=False))
    table = Table("decisions", "Decisions", columns, rows, notes)
    panels = tuple(_panels(run))
    legend = tuple({series.key: None for panel in panels for series in panel.series})
    groups = (Group("", panels, legend, CAPTION),) if panels else ()
    yield Section("decisions", "Decisions", groups=groups, tables=(table,))


def _panels(run: Run) -> Iterator[Plot]:
    accounts = [(step.number + 1, step.account) for step in run.steps if step.account]
    keys = actor_keys(name for _, account in accounts for name in account)
    for what, (title, label) in WEIGHED.items():
        series = []
        for name, key in keys.items():
            points = [(at, account[name].get(what)) for at, account in accounts if name in account]
            series.append(thinned(key, *zip(*points, strict=True), bin_size(len(points)), form="line"))
        if series:
            yield Plot(f"decisions_{what}", title, "step", label, tuple(series))
