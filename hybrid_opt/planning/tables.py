"""What `hybrid-opt plan` shows of memory, computing and exchange. Next: `../cli/planning.py`."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from hybrid_opt.planning.checking import size
from hybrid_opt.planning.prediction import Prediction
from hybrid_opt.planning.traffic import Totals


def memory_tables(predictions: Iterable[Prediction], ranks: int) -> Iterator[Table]:
    """One a phase: kind of memory -> bytes of a rank."""
    for found in predictions:
        phase = "" if found.phase is None else f"phase {found.phase}: "
        each = f", each of {ranks} ranks" if ranks > 1 else ""
        table = Table("when", "memory", "bytes", title=f"{phase}predicted memory{each}", title_justify="left")
        table.columns[2].justify = "right"
        for kind, count in found.lasting.items():
            table.add_row("always", kind, size(count))
        for name, acting in found.acting.items():
            table.add_section()
            for kind, count in acting.held.items():
                table.add_row(f"{name} acts", kind, size(count))
            for i, (kind, count) in enumerate(acting.passing.items()):
                table.add_row(
                    f"{name} acts", f"{kind}{', then' if i == 0 and len(acting.passing) > 1 else ''}", size(count)
                )
        table.add_section()
        how = "all that act together" if found.together else "the largest of those that act"
        table.add_row("peak", f"always, and {how}", size(found.peak), style="bold")
        yield table


def totals_table(totals: Mapping[str, Totals], ranks: int) -> Table:
    """Estimator -> what it takes in the whole run."""
    table = Table(
        "estimator", "steps", "forwards", "backwards", "tokens, at most", *(["sent by a rank"] if ranks > 1 else [])
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, total in totals.items():
        row = (total.steps, total.forwards, total.backwards, total.tokens)
        table.add_row(name, *(f"{value:,}" for value in row), *([size(total.sent)] if ranks > 1 else []))
    return table


def notes(left_out: Iterable[str], device: str) -> Iterator[Text]:
    """What the numbers do not say."""
    for name in left_out:
        yield Text(f"{name}: not predicted, because it writes completions (a reward); --calibrate measures it")
    if device == "cpu":
        yield Text("Python and its libraries take some 0.5 GB more on a CPU")


def document(predictions: Iterable[Prediction], totals: Mapping[str, Totals]) -> dict[str, Any]:
    """All of it in plain values."""
    return {
        "phases": [
            {
                "phase": found.phase,
                "lasting": found.lasting,
                "acting": {name: asdict(acting) for name, acting in found.acting.items()},
                "peak_bytes": found.peak,
            }
            for found in predictions
        ],
        "totals": {name: asdict(total) for name, total in totals.items()},
    }
