"""What a report says, without how it looks: sections of texts, tables and panels. Next: `run_sections.py`, `study_sections.py`.

One idea: one content, four formats. Tables keep values beside the function that writes them, and panels keep the numbers that
are drawn, so that JSON gets numbers, and Markdown, HTML and PNG show the same texts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hybrid_opt.reports.wording import text_of


@dataclass(frozen=True)
class Column:
    """A column of a table: the rows' key, the heading, and how a value is written."""

    key: str
    title: str
    show: Callable[[Any], str] = text_of
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of values by column key. The first column names the row."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()

    def texts(self) -> list[list[str]]:
        """All cells as they are shown."""
        return [[column.show(row.get(column.key)) for column in self.columns] for row in self.rows]


@dataclass(frozen=True)
class Key:
    """How one thing is drawn wherever it appears; an entry of a legend. No two differ by colour alone."""

    label: str
    colour: str
    """A name of `colours.LIGHT`."""
    marker: str = ""
    dash: str = "-"
    """Empty where only the number is meant."""
    number: int | None = None
    """Written beside its line or point."""


@dataclass(frozen=True)
class Series:
    """Points of one thing. `low` and `high` are a band around a line, or the bar of a point."""

    key: Key
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    form: str = "line"
    """line, points (faint marks), faint (a faint line), front (a staircase), solid or hollow (a point with its number)."""


@dataclass(frozen=True)
class Plot:
    """Series over two axes. With `categories` the vertical axis lists them from top to bottom."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    categories: tuple[str, ...] = ()
    log: bool = False
    """The axis of values (the horizontal one with categories) is logarithmic."""
    from_zero: bool = False
    """The vertical axis begins at zero."""


@dataclass(frozen=True)
class Lane:
    """One estimator's weights over steps: `weights[i]` from `edges[i]` to `edges[i + 1]`."""

    label: str
    key: Key
    edges: tuple[float, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Timeline:
    """Who acted when: a lane for each estimator, as high as its weight."""

    name: str
    title: str
    lanes: tuple[Lane, ...]
    x_label: str = "step"


@dataclass(frozen=True)
class Group:
    """Panels that share a legend and a caption."""

    title: str
    panels: tuple[Plot | Timeline, ...]
    legend: tuple[Key, ...]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A titled part of a report."""

    name: str
    title: str
    texts: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    groups: tuple[Group, ...] = ()
    code: str = ""
    code_title: str = ""
    detail: bool = False
    """Left out where there is room for the main things only, as in a picture."""


@dataclass(frozen=True)
class Report:
    """The whole content."""

    kind: str
    """run or study."""
    title: str
    description: str
    facts: tuple[tuple[str, str], ...]
    """Name and value of what a reader wants to know first."""
    remarks: tuple[str, ...] = ()
    sections: tuple[Section, ...] = field(default=())
