"""A study in the terminal: its arms before it runs, and its results after. Next: nothing; this is the end."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from hybrid_opt.studies.arms import StudyPlan, compact
from hybrid_opt.studies.goal import compared_by


def arms_table(plan: StudyPlan) -> Table:
    """The arms, and what each changes."""
    table = Table(Column("arm", overflow="fold"), Column("changes", overflow="fold"))
    for arm in plan.arms:
        changes = compact({".".join(keys): value for keys, value in arm.changes})
        said = f"built-in baseline, made from {plan.base.name}" if arm.baseline else changes
        table.add_row(Text(arm.name), Text(said))
    return table


def count_line(plan: StudyPlan) -> str:
    """How many runs there are, and how long they take at the least."""
    study, cells = plan.study, len(plan.cells)
    tried = study.learning_rates.tries if study.learning_rates else 0
    each = len(study.seeds) + tried
    tasks, budgets = ", ".join(plan.tasks), ", ".join(budget.label for budget in study.budgets)
    line = f"{cells * len(study.seeds)} runs: {len(plan.arms)} arms, tasks {tasks}, budgets {budgets}, seeds {list(study.seeds)}"
    line += f"; {cells * tried} more to search learning rates" if tried else ""
    if all(budget.seconds for budget in study.budgets):
        hours = (
            sum(budget.seconds for budget in study.budgets) * cells / len(study.budgets) * each / study.processes / 3600
        )
        line += f"; {hours:.1f} hours of steps"
    return line


def result_tables(summaries: Sequence[dict[str, Any]], metric: str | None, reference: str | None) -> Iterator[Table]:
    """For each task and budget: a row an arm, with the mean over seeds and half of its 95 % interval."""
    for task, budget in dict.fromkeys((row["task"], row["budget"]) for row in summaries):
        rows = [row for row in summaries if (row["task"], row["budget"]) == (task, budget)]
        goal = compared_by(rows)
        measures = {
            goal: goal,
            **({f"{goal}_difference": "difference"} if reference else {}),
            **({"metric": metric} if metric not in (None, goal) else {}),
        }
        caption = f"difference: of the {goal} to {reference}'s on the same seeds" if reference else None
        table = Table(
            title=f"{task}, {budget}",
            caption=caption,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
        )
        table.add_column("arm", overflow="fold")
        for name in ("seeds", *measures.values(), "steps", "seconds", "forwards", "backwards", "GB"):
            table.add_column(name, justify="right", overflow="fold")
        for row in rows:
            table.add_row(*_cells(row, measures))
        yield table


def _cells(row: dict[str, Any], measures: Sequence[str]) -> Iterator[str]:
    yield row["arm"]
    yield f"{row['seeds']}" + (f" ({row['failed']} failed)" if row["failed"] else "")
    for name in measures:
        mean, high = row[name], row[f"{name}_high"]
        sign = "+" if name.endswith("difference") else ""
        yield _number(mean, f"{sign}.3f") + ("" if high is None else f" ± {high - mean:.3f}")
    yield from (_number(row[name], ",.0f") for name in ("steps", "seconds", "forwards", "backwards"))
    yield _number(row["peak_memory_bytes"] and row["peak_memory_bytes"] / 1e9, ".2f")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
