"""How `hybrid-opt bench` shows what it measured, and what it is busy with. Next: `../cli/measuring.py`.

One idea: the table is made from the same dictionaries that go into the JSON file.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table


class StatusLine:
    """One line on stderr that says what is being measured; nothing if stderr is no terminal."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Put this in the place of what the line said."""
        if self.terminal:
            # Not rich's spinner: the thread that turns it would take its share of the processor that is measured.
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> "StatusLine":
        return self

    def __exit__(self, *failure: object) -> None:
        self.show("")


def case_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of one case. A spread is the distance from the least to the most, in percent of the median."""
    repeats = max(len(row["seconds"]) for row in rows)
    table = Table(
        caption=f"medians of {repeats} turns; spread: least to most, in percent; {_ratio_of(rows)}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("row")
    for column in ("seconds", "spread", "tokens/s", "evals/s", "ratio", "spread", "peak MB", "memory ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["name"], *_cells(row))
    return table


def distributed_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of `--distributed` for one case."""
    table = Table(
        caption="one thread a rank; efficiency: seconds on one rank by ranks times seconds on all; memory of one rank",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("row")
    for column in ("ranks", "seconds", "efficiency", "spread", "peak MB", "memory ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        efficiency, peak = row.get("efficiency"), row.get("peak_memory_bytes")
        table.add_row(
            row["name"],
            str(row["ranks"]),
            _number(row.get("seconds_median")),
            _number(efficiency),
            _spread(efficiency, row.get("efficiency_min"), row.get("efficiency_max")),
            f"{peak / 1e6:,.0f}" if peak else row.get("problem") or "",
            _number(row.get("memory_ratio_to_inference")),
        )
    return table


def header_of(rows: Sequence[dict[str, Any]]) -> str:
    """What the rows of one case have in common, in a line or two."""
    row = rows[0]
    return (
        f"{row['model']} in {row['dtype']}: {row['members']} members x {row['examples']} examples x {row['tokens']} tokens"
        f"{_new_tokens(rows)} "
        f"(members_per_forward {row['members_per_forward'] or 'auto'}{_masters(rows)})\n"
        f"{row['machine']} ({row['device']}), {row['threads']} threads, torch {row['versions']['torch']}"
    )


def _ratio_of(rows: Sequence[dict[str, Any]]) -> str:
    references = dict.fromkeys(row["reference"] for row in rows)
    told = " (generate's, and tokens/s of new tokens, in rows that write)" if len(references) > 1 else ""
    return f"ratio: {next(iter(references))}'s seconds by the row's{told}"


def _new_tokens(rows: Sequence[dict[str, Any]]) -> str:
    """How many tokens are written, where any are."""
    return next((f" + {row['new_tokens']} new" for row in rows if row["new_tokens"]), "")


def _masters(rows: Sequence[dict[str, Any]]) -> str:
    """How each row's updates add up, where that is a question."""
    if rows[0]["dtype"] == "float32":
        return ""
    kinds = dict.fromkeys(row["master_weights"] for row in rows if row["master_weights"])
    named = (f"{kind} for {', '.join(r['name'] for r in rows if r['master_weights'] == kind)}" for kind in kinds)
    return f"; master weights: {'; '.join(named)}" if kinds else ""


def remarks(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each thing that could not be measured."""
    for row in rows:
        if row["problem"]:
            yield f"{row['name']}: {row['problem']}"
        if row["memory_problem"] and row["memory_problem"] != row["problem"]:
            yield f"{row['name']}: no memory: {row['memory_problem']}"


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield _number(row["seconds_median"]) or "failed"
    yield _spread(row["seconds_median"], row["seconds_min"], row["seconds_max"])
    yield _number(row["tokens_per_second"])
    yield _number(row["evaluations_per_second"])
    ratio = row[f"ratio_to_{row['reference']}"]
    yield _number(ratio)
    yield _spread(ratio, row["ratio_min"], row["ratio_max"])
    yield f"{row['peak_memory_bytes'] / 1e6:,.0f}" if row["peak_memory_bytes"] else ""
    yield _number(row[f"memory_ratio_to_{row['reference']}"])


def _number(value: float | None) -> str:
    """Three digits, or all before the point; nothing for None."""
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _spread(median: float | None, least: float | None, most: float | None) -> str:
    return "" if median is None else f"{(most - least) / median:.0%}"
