"""The results of a study as tables: a row a run, and a row an arm. Next: `../reports/`, which shows them.

One idea: the tidy table is the result, and everything else is computed from it, so a reader can compute something else.
"""

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from scipy import stats

from hybrid_opt.run_files.durable import write_atomically, written_aside

CONFIDENCE = 0.95
COUNTED = (
    "steps",
    "seconds",
    "forwards",
    "backwards",
    "forward_equivalents",
    "tokens",
    "peak_memory_bytes",
)
"""Columns of which an arm's mean is told."""
RESULT_TYPES = {
    "task": "string",
    "budget": "string",
    "arm": "string",
    "seed": "int64",
    "loss": "float64",
    "reward": "float64",
    "metric": "float64",
    "loss_before": "float64",
    "reward_before": "float64",
    "metric_before": "float64",
    "steps": "int64",
    "seconds": "float64",
    "forwards": "int64",
    "backwards": "int64",
    "forward_equivalents": "float64",
    "tokens": "int64",
    "peak_memory_bytes": "int64",
    "skipped": "int64",
    "reward_errors": "int64",
    "learning_rate_factor": "float64",
    "fitted": "string",
}
"""Columns of the tidy table, one row for each finished run. `reward` is empty where the objective is none; `loss` is its negative."""
MEASURES = ("loss", "reward", "metric")

Row = dict[str, Any]


def result_row(summary: dict[str, Any], metric: str | None, **known: Any) -> Row:
    """The row of a run.

    Args:
        summary: what the run left in `summary.json`.
        metric: the measure to report beside the loss or the reward.
        known: the columns that the summary does not tell (task, budget, arm, seed, learning_rate_factor, fitted).
    """
    shares = summary["estimators"].values()
    counts = {
        name: sum(share[name] for share in shares)
        for name in ("forwards", "backwards", "forward_equivalents", "tokens")
    }
    counts |= {n: sum(s.get("counts", {}).get(n, 0) for s in shares) for n in ("skipped", "reward_errors")}
    measures = {"loss": "loss", "reward": "reward" if summary.get("goal") == "reward" else None, "metric": metric}
    found = {
        **known,
        **counts,
        **{column: summary["after"].get(measure) for column, measure in measures.items()},
        **{f"{column}_before": summary["before"].get(measure) for column, measure in measures.items()},
        **{name: summary[name] for name in ("steps", "seconds", "peak_memory_bytes")},
    }
    return {name: found[name] for name in RESULT_TYPES}


def write_results(rows: Sequence[Row], folder: Path) -> None:
    """The tidy table as `results.csv` and `results.parquet`."""
    write_csv(rows, RESULT_TYPES, folder / "results.csv")
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in RESULT_TYPES.items()])
    with written_aside(folder / "results.parquet") as aside:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), aside)


def write_csv(rows: Sequence[Row], columns: Sequence[str] | dict[str, str], path: Path) -> None:
    """Rows as CSV; None as an empty field."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, file.getvalue())


def summarise(rows: Sequence[Row], arms: Sequence[tuple[str, str, str]], reference: str | None) -> list[Row]:
    """A row for each (task, budget, arm), in the order of `arms`; an arm of which no run has finished has no numbers.

    Means and their 95 % intervals are over seeds: `mean +- t(n-1) s / sqrt(n)`. Differences are paired: of each seed that both the
    arm and the reference have finished, then the same interval. An arm is on the front of loss and memory (or seconds) if no other
    of its task and budget is as good in both and better in one.
    """
    by_cell: dict[tuple[str, str, str], list[Row]] = {cell: [] for cell in arms}
    for row in rows:
        by_cell[row["task"], row["budget"], row["arm"]].append(row)
    summaries = []
    for (task, budget, arm), own in by_cell.items():
        others = by_cell.get((task, budget, reference), []) if arm != reference else []
        summary: Row = {"task": task, "budget": budget, "arm": arm, "seeds": len(own)}
        for measure in MEASURES:
            summary |= _named(measure, interval(_known(own, measure)))
            summary |= _named(f"{measure}_difference", interval(_paired(own, others, measure)))
        summary |= {name: interval(_known(own, name))[0] for name in COUNTED}
        summaries.append(summary)
    for other, column in (("peak_memory_bytes", "pareto_memory"), ("seconds", "pareto_seconds")):
        _mark_front(summaries, other, column)
    return summaries


SUMMARY_COLUMNS = (
    *("task", "budget", "arm", "seeds", "failed"),
    *(f"{m}{part}" for m in MEASURES for part in ("", "_low", "_high")),
    *(f"{m}_difference{part}" for m in MEASURES for part in ("", "_low", "_high")),
    *COUNTED,
    *("pareto_memory", "pareto_seconds"),
)


def interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Mean, and the two ends of its 95 % interval by Student's t; no ends for fewer than two values."""
    if not values:
        return None, None, None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def _named(measure: str, values: tuple[float | None, ...]) -> Row:
    return dict(zip((measure, f"{measure}_low", f"{measure}_high"), values, strict=True))


def _known(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row[name] is not None]


def _paired(rows: Sequence[Row], others: Sequence[Row], name: str) -> list[float]:
    """Differences to the others, by seed."""
    theirs = {row["seed"]: row[name] for row in others if row[name] is not None}
    return [row[name] - theirs[row["seed"]] for row in rows if row["seed"] in theirs and row[name] is not None]


def _mark_front(summaries: Sequence[Row], other: str, column: str) -> None:
    for row in summaries:
        rivals = [r for r in summaries if (r["task"], r["budget"]) == (row["task"], row["budget"])]
        row[column] = row["loss"] is not None and not any(_beats(rival, row, other) for rival in rivals)


def _beats(rival: Row, row: Row, other: str) -> bool:
    if rival["loss"] is None:
        return False
    as_good = rival["loss"] <= row["loss"] and rival[other] <= row[other]
    return as_good and (rival["loss"] < row["loss"] or rival[other] < row[other])
