"""A report as Markdown, tables first, to be put into a README. Next: `picture.py`.

One idea: what a user wrote must not become Markdown of its own.
"""

import re
from collections.abc import Iterator

from hybrid_opt.reports.content import Report, Section, Table


def as_markdown(report: Report, picture: str) -> str:
    """The texts and tables, and a reference to the picture of the panels; details are left out of both.

    Args:
        picture: the picture's file, relative to the Markdown file.
    """
    first, *rest = report.sections
    facts = ", ".join(f"{_safe(name)}: {_safe(value)}" for name, value in report.facts)
    parts = [f"# {_safe(report.title)}", *_body(first), _safe(report.description), facts]
    parts += [f"- {_safe(remark)}" for remark in report.remarks]
    if any(section.groups for section in report.sections):
        parts.append(f"![figures](<{picture}>)")
    for section in (section for section in rest if not section.detail):
        parts += [f"## {section.title}", *_body(section)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _body(section: Section) -> Iterator[str]:
    for table in section.tables:
        yield f"**{_safe(table.caption)}**"
        yield _table(table)
        yield "\n".join(f"- {_safe(note)}" for note in table.notes)
    yield from (_safe(text) for text in section.texts)
    yield from dict.fromkeys(_safe(group.caption) for group in section.groups)
    if section.code:
        # A fence longer than any in the text ends only where we end it.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", section.code)), default=0))
        yield f"**{section.code_title}**"
        yield f"{fence}yaml\n{section.code.rstrip()}\n{fence}"


def _table(table: Table) -> str:
    rows = [[column.title for column in table.columns], *table.texts()]
    lines = [f"| {' | '.join(_safe(cell) for cell in row)} |" for row in rows]
    sides = " | ".join("---:" if column.numeric else "---" for column in table.columns)
    return "\n".join([lines[0], f"| {sides} |", *lines[1:]])


def _safe(text: str) -> str:
    """On one line, with the characters escaped that mean something."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
