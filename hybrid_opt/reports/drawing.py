"""Panels drawn with matplotlib, in any palette. Next: `svg.py`, `picture.py`.

One idea: colours are named by role and looked up in the palette given, so that a picture and a page are drawn by the same lines.
"""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from hybrid_opt.reports.content import Key, Plot, Series, Timeline
from hybrid_opt.reports.placing import DISTANCES, around_points, beside_ends
from hybrid_opt.reports.wording import short

Palette = Mapping[str, str]

WIDTH = 4.2
STYLE = {
    "font.size": 10,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "lines.solid_capstyle": "round",
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "font.family": "DejaVu Sans",
}


def height_of(panel: Plot | Timeline) -> float:
    """Inches, so that each lane or layer has its room."""
    if isinstance(panel, Timeline):
        return 0.75 + 0.24 * max(2, len(panel.lanes))
    return min(4.4, max(2.0, 0.9 + 0.17 * len(panel.categories))) if panel.categories else 2.6


def draw(ax: Axes, panel: Plot | Timeline, palette: Palette) -> None:
    """Draw a panel without its title."""
    if isinstance(panel, Timeline):
        _draw_timeline(ax, panel, palette)
    else:
        _draw_plot(ax, panel, palette)
    ax.set_xlabel(panel.x_label, color=palette["muted"])
    ax.set_facecolor("none")
    ax.tick_params(colors=palette["muted"], which="both")
    for spine in ax.spines.values():
        spine.set_color(palette["muted"])


def draw_key(key: Key, palette: Palette) -> Figure:
    """The sample of a legend's entry."""
    figure = Figure(figsize=(0.4, 0.16))
    figure.patch.set_alpha(0)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.plot((0.06, 0.94), (0.5, 0.5), color=palette[key.colour], linestyle=key.dash)
    ax.plot((0.5,), (0.5,), color=palette[key.colour], marker=key.marker or None, markersize=5)
    return figure


# ---------------------------------------------------------------- who acted


def _draw_timeline(ax: Axes, panel: Timeline, palette: Palette) -> None:
    for row, lane in enumerate(panel.lanes):
        edges = [edge for edge in lane.edges for _ in (0, 1)][1:-1]
        heights = [-row + 0.8 * weight for weight in lane.weights for _ in (0, 1)]
        ax.fill_between((edges[0], edges[-1]), -row, 0.8 - row, color=palette["grid"], alpha=0.5, linewidth=0)
        ax.fill_between(edges, -row, heights, color=palette[lane.key.colour], linewidth=0)
    ax.set_yticks([0.35 - row for row in range(len(panel.lanes))], [lane.label for lane in panel.lanes])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_ylim(-len(panel.lanes) + 0.9, 1)
    ax.margins(x=0.01)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(short))


# ---------------------------------------------------------------- series over two axes


def _draw_plot(ax: Axes, panel: Plot, palette: Palette) -> None:
    for series in panel.series:
        _FORMS[series.form](ax, series, palette)
    ax.grid(color=palette["grid"], linewidth=0.6)
    ax.set_axisbelow(True)
    values = ax.xaxis if panel.categories else ax.yaxis
    if panel.categories:
        _list_categories(ax, panel.categories)
    else:
        ax.set_title(panel.y_label, loc="left", fontsize=10, color=palette["muted"], pad=5)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(FuncFormatter(short))
        _limit_bands(ax, panel)
    if panel.log:
        _make_logarithmic(ax, values)
    else:
        whole = panel.from_zero and all(float(value).is_integer() for series in panel.series for value in series.y)
        values.set_major_locator(MaxNLocator(5, integer=whole))
        values.set_major_formatter(FuncFormatter(short))
    _write_numbers(ax, panel, palette)


def _limit_bands(ax: Axes, panel: Plot) -> None:
    """Two seeds can have an interval a hundred times as wide as all lines; they decide the limits, bands get half as much beyond."""
    values = [value for series in panel.series for value in series.y]
    if not values:
        return
    least, most = min(values), max(values)
    room = 0.5 * (most - least) or 0.05 * abs(most) or 1.0
    ends = [value for series in panel.series for side in (series.low, series.high) for value in side or ()]
    low = max(min([least, *ends]), least - room) - 0.2 * room
    high = min(max([most, *ends]), most + room) + 0.2 * room
    low = max(low, -0.1 * most) if least >= 0 else low
    high = max(high, 1.05 * most) if panel.from_zero else high
    ax.set_ylim(0 if panel.from_zero else max(low, 0.8 * least) if panel.log else low, high)


def _make_logarithmic(ax: Axes, axis: Any) -> None:
    (ax.set_xscale if axis is ax.xaxis else ax.set_yscale)("log")
    least, most = axis.get_view_interval()
    steps = (1.0,) if most > 300 * least else (1.0, 2.0, 5.0) if most < 20 * least else (1.0, 3.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=6))
    axis.set_major_formatter(FuncFormatter(short))
    axis.set_minor_locator(NullLocator())


def _list_categories(ax: Axes, categories: tuple[str, ...]) -> None:
    """From top to bottom; of many numbered layers every second or fifth is named."""
    numbered = sum(name.isdigit() for name in categories)
    every = 1 if numbered <= 16 else 2 if numbered <= 32 else 5 if numbered <= 80 else 10
    named = [i for i, name in enumerate(categories) if not name.isdigit() or int(name) % every == 0]
    ax.set_yticks(named, [categories[i] for i in named])
    ax.set_ylim(len(categories) - 0.5, -0.5)


def _line(ax: Axes, series: Series, palette: Palette) -> None:
    key, colour = series.key, palette[series.key.colour]
    if series.low and series.high:
        ax.fill_between(series.x, series.low, series.high, color=colour, alpha=0.16, linewidth=0)
    marker = key.marker if len(series.x) <= 40 else ""
    ax.plot(series.x, series.y, color=colour, linestyle=key.dash, marker=marker or None)


def _faint(ax: Axes, series: Series, palette: Palette) -> None:
    colour = palette[series.key.colour]
    ax.fill_between(series.x, series.low, series.high, color=colour, alpha=0.12, linewidth=0)
    ax.plot(series.x, series.y, color=colour, linestyle=series.key.dash, linewidth=1, alpha=0.7)


def _points(ax: Axes, series: Series, palette: Palette) -> None:
    colour = palette[series.key.colour]
    ax.plot(series.x, series.y, color=colour, linestyle="none", marker=series.key.marker, alpha=0.6, markeredgewidth=0)


def _front(ax: Axes, series: Series, palette: Palette) -> None:
    colour = palette[series.key.colour]
    ax.plot(series.x, series.y, color=colour, linestyle="--", linewidth=1, drawstyle="steps-post", zorder=1)


def _point(ax: Axes, series: Series, palette: Palette) -> None:
    colour = palette[series.key.colour]
    inside = colour if series.form == "solid" else palette["paper"]
    if series.low and series.high:
        ax.plot((series.x[0],) * 2, (series.low[0], series.high[0]), color=colour, linewidth=1, alpha=0.6)
    ax.plot(series.x, series.y, color=colour, marker="o", markersize=7, markerfacecolor=inside, linestyle="none")


_FORMS = {"line": _line, "faint": _faint, "points": _points, "front": _front, "solid": _point, "hollow": _point}


def _keep_together(ax: Axes, costs: list[float]) -> None:
    """Costs that are the same but for some thousandths must not look far apart."""
    middle = (min(costs) + max(costs)) / 2
    if max(costs) - min(costs) < 0.05 * middle and ax.get_xlim()[0] > 0:
        ax.set_xlim(0.9 * middle, 1.1 * middle)


def _write_numbers(ax: Axes, panel: Plot, palette: Palette) -> None:
    """The key's number beside each point, or at the end of each line."""
    numbered = [series for series in panel.series if series.key.number and series.x]
    if not numbered:
        return
    ends = [(series.x[-1], series.y[-1]) for series in numbered]
    width, height = 72 * (WIDTH - 0.9), 72 * (height_of(panel) - 0.8)
    ax.margins(x=0.09)
    ax.autoscale_view(scaley=False)
    lines = numbered[0].form == "line"
    if not lines:
        _keep_together(ax, [x for x, _ in ends])
    inside = (ax.transScale + ax.transLimits).transform(ends)
    inside = [(x * width, y * height) for x, y in inside]
    offsets = beside_ends(inside, height) if lines else around_points(inside, width, height)
    for series, end, offset in zip(numbered, ends, offsets, strict=True):
        text = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 9, "color": palette["ink"]}
        leader = {"arrowstyle": "-", "color": palette[series.key.colour], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
        far = math.hypot(*offset) > 1.5 * DISTANCES[0] or (lines and offset[1])
        ax.annotate(str(series.key.number), end, offset, arrowprops=leader if far else None, **text)
