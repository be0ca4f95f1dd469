"""A report as one tall picture: the main tables, then the panels. Next: nothing; this is the end.

One idea: every part is drawn as a picture of its own and they are put together, so that no part can squeeze another.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D

from hybrid_opt.reports.colours import LIGHT
from hybrid_opt.reports.content import Group, Key, Report, Section, Table
from hybrid_opt.reports.drawing import STYLE, WIDTH, draw, height_of

COLUMNS, DPI = 4, 100
PAGE = COLUMNS * WIDTH


def write_picture(report: Report, path: Path) -> None:
    """Write the PNG file; sections of details are left out."""
    with matplotlib.rc_context(STYLE):
        blocks = [_pixels(_heading(report.title, 18, PAGE))]
        blocks += [_section(section) for section in report.sections if not section.detail and _has_parts(section)]
        imsave(path, _stacked(_side_by_side(row) for row in _rows(blocks)))


def _section(section: Section) -> np.ndarray:
    parts = [_pixels(part) for part in _parts(section)]
    width = max(part.shape[1] for part in parts)
    return _stacked([_pixels(_heading(section.title, 13, width / DPI)), *parts])


def _has_parts(section: Section) -> bool:
    return bool(section.groups or (section.tables and section.name != "what_was_run"))


def _parts(section: Section) -> list[Figure]:
    tables = section.tables if section.name != "what_was_run" else ()
    return [_table(table) for table in tables] + [_group(group) for group in section.groups]


def _heading(text: str, size: int, width: float) -> Figure:
    figure = Figure(figsize=(width, 0.035 * size))
    figure.text(0.1 / width, 0.25, _plain(text), fontsize=size, fontweight="bold", color=LIGHT["ink"])
    return figure


def _group(group: Group) -> Figure:
    columns = min(COLUMNS, len(group.panels))
    rows, lines = math.ceil(len(group.panels) / columns), math.ceil(len(group.legend) / 4)
    tall = 0.3 + max(map(height_of, group.panels))
    size = (WIDTH * columns, rows * tall + 0.22 * lines + 0.2 + 0.3 * bool(group.title))
    figure = Figure(figsize=size, layout="constrained")
    for ax, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, group.panels, strict=False):
        draw(ax, panel, LIGHT)
        ax.set_title(_plain(panel.title), loc="left", fontsize=10, fontweight="bold", color=LIGHT["ink"])
        ax.set_ylabel(getattr(panel, "y_label", ""), color=LIGHT["muted"])
    for ax in figure.axes[len(group.panels) :]:
        ax.remove()
    if group.title:
        figure.suptitle(_plain(group.title), x=0.01, ha="left", fontsize=11, color=LIGHT["ink"])
    if group.legend:
        figure.legend(handles=[_handle(key) for key in group.legend], loc="outside lower left", ncols=4, frameon=False)
    return figure


def _handle(key: Key) -> Line2D:
    label = _plain(f"{key.number}. {key.label}" if key.number else key.label)
    return Line2D((), (), color=LIGHT[key.colour], linestyle=key.dash, marker=key.marker or None, label=label)


def _table(table: Table) -> Figure:
    rows = [[column.title for column in table.columns], *table.texts()]
    widths = [max(4, *(len(row[i]) for row in rows)) for i in range(len(table.columns))]
    # A monospaced digit is .602 of the font size wide.
    size = min(10.0, 72 * (PAGE - 0.3) / (0.602 * (sum(widths) + 3 * len(widths))))
    lines = [_plain(table.caption), *(_line(row, widths, table) for row in rows)]
    figure = Figure(figsize=(PAGE, 0.3 + len(lines) * size * 1.5 / 72))
    text = {"family": "DejaVu Sans Mono", "fontsize": size, "linespacing": 1.45, "va": "top", "color": LIGHT["ink"]}
    figure.text(0.012, 0.96, "\n".join(lines), **text)
    return figure


def _line(row: list[str], widths: list[int], table: Table) -> str:
    cells = zip(row, widths, table.columns, strict=True)
    return _plain("   ".join(cell.rjust(w) if column.numeric else cell.ljust(w) for cell, w, column in cells))


def _plain(text: str) -> str:
    """Dollar signs would begin mathematics."""
    return text.replace("$", r"\$")


def _pixels(figure: Figure) -> np.ndarray:
    """(rows, columns, 4)"""
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def _rows(blocks: Iterable[np.ndarray]) -> list[list[np.ndarray]]:
    """Blocks in their order, as many in a row as the page is wide."""
    rows: list[list[np.ndarray]] = []
    for block in blocks:
        if rows and sum(other.shape[1] for other in rows[-1]) + block.shape[1] <= PAGE * DPI:
            rows[-1].append(block)
        else:
            rows.append([block])
    return rows


def _side_by_side(blocks: Sequence[np.ndarray]) -> np.ndarray:
    tall = max(block.shape[0] for block in blocks)
    return np.concatenate([_padded(block, tall, block.shape[1]) for block in blocks], axis=1)


def _stacked(blocks: Iterable[np.ndarray]) -> np.ndarray:
    blocks = list(blocks)
    wide = max(block.shape[1] for block in blocks)
    return np.concatenate([_padded(block, block.shape[0], wide) for block in blocks])


def _padded(block: np.ndarray, tall: int, wide: int) -> np.ndarray:
    """White below and to the right."""
    return np.pad(block, ((0, tall - block.shape[0]), (0, wide - block.shape[1]), (0, 0)), constant_values=255)
