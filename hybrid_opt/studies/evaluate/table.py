"""The table of an evaluation on the screen. Next: `../../cli/evaluating.py`.

One idea: a difference whose interval includes 0 is not told apart, and the table says so.
"""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from hybrid_opt.reports.wording import number, with_interval
from hybrid_opt.studies.evaluate.measuring import PERPLEXITY, Measured
from hybrid_opt.studies.evaluate.subject import BASE, EVALUATED, SECOND, Subject

LOWER_IS_BETTER = ("loss", PERPLEXITY)


def evaluation_table(subject: Subject, found: Sequence[Measured]) -> Table:
    """A row for each set and measure, a column for each model."""
    table = Table(
        caption="± half of the 95 % interval over rows"
        + "; differences are taken row by row" * (BASE in subject.models),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("rows of", "measure"):
        table.add_column(column)
    for label in subject.models:
        table.add_column(label, justify="right")
    if BASE in subject.models:
        table.add_column("difference", justify="right")
    for name in subject.sets:
        measured = [m for m in found if m.set == name]
        for i, measure in enumerate(dict.fromkeys(m.measure for m in measured)):
            of = {m.model: m for m in measured if m.measure == measure}
            count = of[EVALUATED].rows
            where = f"{subject.rows_of(name)} ({count})" if i == 0 else ""
            cells = [_shown(of[label]) if label in of else "" for label in subject.models]
            table.add_row(where, measure, *cells, *([_difference(of[EVALUATED])] if BASE in subject.models else []))
    return table


def _shown(measured: Measured) -> str:
    """A perplexity's interval has two different halves."""
    if measured.measure != PERPLEXITY or measured.low is None:
        return with_interval(measured.value, measured.low, measured.high)
    return f"{number(measured.value)} ({number(measured.low)} to {number(measured.high)})"


def verdict(found: Sequence[Measured]) -> str | None:
    """In words, whether the model has become worse on the second set; None where nobody asked."""
    told = next((m for m in found if m.set == SECOND and m.model == EVALUATED and m.difference is not None), None)
    if told is None:
        return None
    worse = told.difference > 0 if told.measure in LOWER_IS_BETTER else told.difference < 0
    if not told.is_told_apart:
        return f"forgetting: no change of the {told.measure} on the second set can be told from chance"
    change = with_interval(told.difference, told.difference_low, told.difference_high, "+")
    return f"forgetting: on the second set the model is {'worse' if worse else 'better'} than the base: {told.measure} {change}"


def _difference(measured: Measured) -> str:
    if measured.difference is None:
        return ""
    shown = with_interval(measured.difference, measured.difference_low, measured.difference_high, "+")
    return shown if measured.is_told_apart else f"{shown} (not told apart)"
