"""The table on the screen, made of the rows that also go into the JSON file. Next: `../../cli/measuring.py`."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from hybrid_opt.studies.verify.quantity import RESOLUTION, WHOLE_RESOLUTION, Quantity

VERDICTS = {True: "pass", False: "[bold]FAIL[/bold]", None: ""}


KNOWN = f"at most {RESOLUTION:.0%} of theory to each side"
REAL = f"for a whole model at most {WHOLE_RESOLUTION:.0%} of theory to each side"
"""How wide intervals may be."""


def verify_table(rows: Sequence[Quantity], title: str, widths: str) -> Table:
    """Theory against measurement, a row each.

    Args:
        widths: `KNOWN` or `REAL`.
    """
    table = Table(
        title=Text(title),
        title_justify="left",
        caption=f"pass: theory lies in the interval, which is {widths}; all intervals together hold theory with probability 99.9 %; "
        "no interval: nothing random, equal to the last bit or to float32's rounding",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("quantity")
    for column in ("theory", "measured", "interval"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in rows:
        interval = "" if row.low == row.high else f"{row.low:.4g} to {row.high:.4g}"
        theory = "" if row.theory is None else f"{row.theory:.4g}"
        table.add_row(row.name, theory, f"{row.measured:.4g}", interval, VERDICTS[row.passed])
    return table


def verdict(rows: Sequence[Quantity]) -> str:
    """How many rows passed, and which did not."""
    judged = [row for row in rows if row.passed is not None]
    failed = [row for row in judged if not row.passed]
    wide = " (its interval is too wide to tell)"
    lines = [f"failed: {row.name}{wide if row.low < row.theory < row.high else ''}" for row in failed]
    return "\n".join([f"{len(judged) - len(failed)} of {len(judged)} pass", *lines])
