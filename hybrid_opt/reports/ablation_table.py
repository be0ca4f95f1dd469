"""The table of a study's arms: means with intervals, and paired differences against the reference. Next: `provenance.py`.

One idea: what the intervals cannot tell apart is said to be not told apart. All statistics are those of `summary.csv`.
"""

from collections.abc import Callable, Iterator
from typing import Any

from hybrid_opt.reports.columns import AMOUNTS, SECONDS, STEPS
from hybrid_opt.reports.content import Column, Table
from hybrid_opt.reports.keys import arm_keys
from hybrid_opt.reports.records import Study
from hybrid_opt.reports.wording import known, number, size, with_interval
from hybrid_opt.run_files.summary import told_counts
from hybrid_opt.studies.goal import BETTER

COSTS = (STEPS, SECONDS, *AMOUNTS, Column("peak_memory_bytes", "peak memory", size))


def ablation_table(study: Study, task: str, budget: str, name: str) -> Table:
    """A row for each arm, in order of display, whether it has finished runs or not."""
    rows, goal = study.summary_of(task, budget), study.goal_of(task, budget)
    return Table(
        name,
        f"{task}, {budget}",
        (Column("title", "arm", numeric=False), Column("runs", "seeds"), *_measured(study, goal), *COSTS),
        tuple(_row(study, task, budget, arm, rows.get(arm, {}), goal) for arm in study.arms),
        tuple(_notes(study, task, budget, rows, goal)),
    )


def _measures(study: Study, goal: str) -> dict[str, tuple[str, str]]:
    """Key in the summary: name, and which side is better."""
    metric = {"metric": (study.metric, study.metric_better)} if study.metric not in (None, goal) else {}
    return {goal: (goal, BETTER[goal]), **metric}


def _measured(study: Study, goal: str) -> list[Column]:
    columns = []
    for key, (title, better) in _measures(study, goal).items():
        columns.append(Column(key, title, lambda value: with_interval(**value) if value else ""))
        if study.reference:
            show = _difference_writer(better)
            columns.append(Column(f"{key}_difference", f"{title} against {study.reference}", show))
    return columns


def _difference_writer(better: str) -> Callable[[dict[str, Any] | None], str]:
    def show(value: dict[str, Any] | None) -> str:
        return f"{with_interval(**value, sign='+')}, {verdict(value, better)}" if value else ""

    return show


def verdict(difference: dict[str, Any], better: str) -> str:
    """What a paired difference says: better, worse, not told apart, or one seed."""
    low, high = difference["low"], difference["high"]
    if not (known(low) and known(high)):
        return "one seed"
    if low <= 0 <= high:
        return "not told apart"
    return "better" if (high < 0) == (better == "lower") else "worse"


def _row(study: Study, task: str, budget: str, arm: str, row: dict[str, Any], goal: str) -> dict[str, Any]:
    label = arm_keys(study.arms, study.reference)[arm]
    cells = {"arm": arm, "title": f"{label.number}. {label.label}", "runs": _runs(study, task, budget, arm)}
    for key in _measures(study, goal):
        for name in (key, f"{key}_difference"):
            if known(row.get(name)):
                cells[name] = {"mean": row[name], "low": row.get(f"{name}_low"), "high": row.get(f"{name}_high")}
    return cells | {column.key: row.get(column.key) for column in COSTS}


def _runs(study: Study, task: str, budget: str, arm: str) -> str:
    """Finished runs, and how many have another status."""
    statuses = [run.status for run in study.runs_of(task, budget, arm)]
    others = [f"{statuses.count(other)} {other}" for other in ("failed", "interrupted", "waiting") if other in statuses]
    finished = str(statuses.count("finished"))
    return f"{finished} ({', '.join(others)})" if others else finished


def _notes(study: Study, task: str, budget: str, rows: dict[str, dict[str, Any]], goal: str) -> Iterator[str]:
    if known_arms := [row for row in rows.values() if known(row.get(f"{goal}_low"))]:
        least, most = (int(pick(row["seeds"] for row in known_arms)) for pick in (min, max))
        seeds = f"{least}" if least == most else f"{least} to {most}"
        yield f"Means over {seeds} seeds with 95 % intervals by Student's t; differences are paired by seed."
    elif any(known(row.get(goal)) for row in rows.values()):
        yield "One seed: there are no intervals, and differences may be chance."
    same = [arm for arm in study.arms if _undecided(rows.get(arm, {}), goal)]
    if same:
        yield f"Not told apart from the reference {study.reference} in {goal}, as the interval includes 0: {', '.join(same)}."
    yield from dict.fromkeys(_changes(study, task, budget))
    yield from _counted(study, task, budget)
    for run in study.runs:
        if (run.task, run.budget, run.status) == (task, budget, "failed"):
            yield f"{run.arm}, seed {run.seed}, failed: {run.error or 'no message was left'}"


def _changes(study: Study, task: str, budget: str) -> Iterator[str]:
    """What the study changed in arms on its own: learning rates that it searched for, and what had to fit the memory."""
    for row in study.results:
        if (row["task"], row["budget"]) == (task, budget):
            if row.get("learning_rate_factor") not in (None, 1.0):
                yield f"{row['arm']}: learning rates were multiplied by {number(row['learning_rate_factor'])}, as the search chose."
            if row.get("fitted"):
                yield f"{row['arm']} was made to fit the memory: {row['fitted']}."


def _counted(study: Study, task: str, budget: str) -> Iterator[str]:
    """What went wrong with an arm's rewards, and how often it had nothing to learn, over all its finished runs."""
    for arm in study.arms:
        rows = [row for row in study.results if (row["task"], row["budget"], row["arm"]) == (task, budget, arm)]
        counts = {n: sum(int(row.get(n) or 0) for row in rows) for n in ("skipped", "reward_errors")}
        if told := told_counts(sum(int(row["steps"]) for row in rows), counts):
            yield f"{arm}: {told}."


def _undecided(row: dict[str, Any], goal: str) -> bool:
    low, high = row.get(f"{goal}_difference_low"), row.get(f"{goal}_difference_high")
    return known(low) and known(high) and low <= 0 <= high
