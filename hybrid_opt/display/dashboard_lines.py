"""The dashboard as lines of text that fit a terminal of any size. Next: `dashboard.py`, which puts them on it.

One idea: each part gives its lines for a width, the table leaves out columns and a short terminal leaves out parts, those
first that say least.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from rich.text import Text

from hybrid_opt.display.run_so_far import Clock, EstimatorSoFar, RunSoFar
from hybrid_opt.display.sparkline import COLOURS, columns, sparkline, strip
from hybrid_opt.run_files.summary import COUNTED
from hybrid_opt.training.goal import shown

WIDEST = 110
"""Columns that are used at most."""
LABEL = 12
"""Columns of the names on the left."""
VALUE = 10
"""Columns of the value before a curve or strip."""
SHORTEST_BAR = 12
"""Columns of the bar for which the time that has passed makes room."""
UNITS = {"seconds": "s", "tokens": "tokens", "forward_equivalents": "forward passes"}
SHORT = {
    "gradient_norm": "grad norm",
    "learning_rate": "lr",
    "completion_tokens": "length",
    "reward_errors": "errors",
    "nonfinite_members": "not finite",
    "tied_pairs": "ties",
    "examples_left_out": "left out",
}


def dashboard_lines(
    run: RunSoFar, clock: Clock, now: float, width: int, height: int, colourless: Any = False
) -> list[Text]:
    """All lines, none of them wider than `width`, and not more than `height` of them."""
    width = min(width, WIDEST)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(run.estimators)}
    parts = {
        "progress": _progress(run, clock, now, width),
        "course": _course(run, width, rows=3 if height >= 20 else 1),
        "acting": _acting(run, width, colours, colourless),
        "validation": _validation(run, width),
        "estimators": _estimators(run, width, colours),
        "speed": _speed(run, width),
        "budget": _budget(run),
    }
    for part in ("budget", "speed", "acting", "estimators", "validation", "course"):
        if sum(map(len, parts.values())) > height:
            parts[part] = []
    spare = height - sum(map(len, parts.values()))
    order = ("progress", "budget", "acting", "course", "validation", "estimators", "speed")
    lines = []
    for part in order:
        if part in ("estimators", "speed") and parts[part] and lines and spare > 0:
            lines, spare = [*lines, Text()], spare - 1
        lines += parts[part]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines[:height]


def _labelled(label: str, *rest: str | tuple[str, str] | Text) -> Text:
    return Text.assemble((f"{label:<{LABEL}}", "dim"), *rest)


def _items(label: str, items: Iterable[Text | str], width: int) -> list[Text]:
    """Items side by side, and below each other where they do not fit."""
    lines = [_labelled(label)]
    for item in items:
        if len(lines[-1]) > LABEL:
            if len(lines[-1]) + 3 + len(item) > width:
                lines.append(_labelled(""))
            else:
                lines[-1].append("   ")
        lines[-1].append(item)
    return lines


def _progress(run: RunSoFar, clock: Clock, now: float, width: int) -> list[Text]:
    step = f"{run.step:,} of {run.steps:,}" if run.steps else f"{run.step:,}"
    step = f"{step:<{VALUE - 2}}  "
    share, passed, left = f" {min(run.done, 1):4.0%}", f"  {duration(now - clock.begun)}", clock.left(now)
    ahead = f"  {duration(left)} left" if left is not None and run.done < 1 else ""
    tails = (share + passed + ahead, share + (ahead or passed))
    tail = next((tail for tail in tails if len(step + tail) + LABEL + SHORTEST_BAR <= width), tails[-1])
    return [_labelled("step", step, *_bar(run.done, min(width - LABEL - len(step + tail), 40)), tail)]


def _bar(done: float, width: int) -> list[tuple[str, str]]:
    width = max(width, 0)
    full, half = divmod(round(2 * width * min(max(done, 0), 1)), 2)
    return [("━" * full + "╸" * half, "green"), ("━" * (width - full - half), "bright_black")]


def _budget(run: RunSoFar) -> list[Text]:
    if not run.currency:
        return []
    return [_labelled("budget", f"{short(run.spent)} of {short(run.limit)} {UNITS[run.currency]}")]


def _acting(run: RunSoFar, width: int, colours: dict[str, str], colourless: bool) -> list[Text]:
    if not run.actors:
        return []
    who = Text(" + ").join(Text(name, colours[name]) for name in run.actors[-1])
    who.truncate(max(VALUE, width // 3), overflow="ellipsis", pad=False)
    who.pad_right(max(2, VALUE - who.cell_len))
    room = max(width - LABEL - who.cell_len, 0)
    return [_labelled("acting", who, strip(list(run.actors)[-room:], colours, colourless))]


def _course(run: RunSoFar, width: int, rows: int) -> list[Text]:
    if run.reached is None:
        return []
    smoothed = f"smoothed {number(run.smoothed)}"
    points = run.course.points
    left = [number(run.reached), smoothed, ""] if rows > 1 else [smoothed]
    scale = max(len(number(value)) for value in (min(points), max(points))) + 1 if rows > 1 else 0
    heights = columns(points, max(width - LABEL - len(smoothed) - 2 - scale, 1))
    right = [number(max(heights)), "", number(min(heights))] if rows > 1 else [""]
    return [
        _labelled(
            "" if i else run.goal,
            f"{left[i]:<{len(smoothed) + 2}}",
            (bars, "blue"),
            (f" {right[i]}" if right[i] else "", "dim"),
        )
        for i, bars in enumerate(sparkline(heights, rows))
    ]


def _validation(run: RunSoFar, width: int) -> list[Text]:
    if not run.latest:
        return []
    items = []
    for name, value in shown(run.latest).items():
        items.append(Text(f"{name} {number(value)}"))
        if name in run.first and run.evaluated_at:
            items[-1].append(f" ({value - run.first[name]:+.4f})", "dim")
    return _items("validation", [*items, Text(f"after {run.evaluated_at:,} steps", "dim")], width)


def _speed(run: RunSoFar, width: int) -> list[Text]:
    if not run.recent:
        return []
    speed = [f"{run.tokens_per_second:,.0f} tokens/s"] if run.tokens_per_second else []
    seconds = sum(seconds for _, seconds in run.recent) / len(run.recent)
    return _items("speed", [*speed, f"{seconds:.3g} s a step", f"peak memory {run.peak_memory / 1e9:.2f} GB"], width)


# ---------------------------------------------------------------- the table

Cell = Callable[[EstimatorSoFar], str]


def _estimators(run: RunSoFar, width: int, colours: dict[str, str]) -> list[Text]:
    if not run.estimators:
        return []
    names = {name: name if len(name) <= 24 else name[:23] + "…" for name in run.estimators}
    first = max(LABEL - 2, *map(len, names.values()), len("estimator"))
    cells = {title: [cell(e) for e in run.estimators.values()] for title, cell in _columns_of(run).items()}
    widths = {title: max(len(title), *map(len, texts)) + 2 for title, texts in cells.items()}
    shown = _fitting(widths, width - first - 2)
    header = "".join(f"{title:>{widths[title]}}" for title in shown)
    lines = [Text(f"{'estimator':<{first + 2}}{header}", "dim")]
    for i, name in enumerate(run.estimators):
        row = "".join(f"{cells[title][i]:>{widths[title]}}" for title in shown)
        lines.append(Text.assemble(("■ ", colours[name]), f"{names[name]:<{first}}", row))
    return lines


def _columns_of(run: RunSoFar) -> dict[str, Cell]:
    """Titles from left to right, and what stands below them. What is counted stands there in total, if there was any."""
    known = run.estimators.values()
    statistics = dict.fromkeys(name for e in known for name in e.statistics if name not in COUNTED)
    cells = {name: _statistic(name) for name in statistics}
    cells |= {name: _count(name) for name in COUNTED if any(e.totals.counts.get(name) for e in known)}
    first = {
        "steps": lambda e: f"{e.totals.steps:,}",
        "forwards": lambda e: f"{e.totals.forwards:,}",
        "backwards": lambda e: f"{e.totals.backwards:,}",
        "seconds": lambda e: f"{e.totals.seconds:,.1f}",
        "lr": lambda e: f"{e.learning_rate:.2g}",
    }
    if any(e.loss is not None for e in known):
        first["loss"] = lambda e: "" if e.loss is None else number(e.loss)
    return first | {title: cells[name] for name, title in _titles(cells, first).items()}


def _titles(names: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """Headings of statistics: short ones, where no other column has the same; a reward function's without its module."""
    titles = {name: SHORT.get(name, name.rpartition(":")[2].replace("_", " ")) for name in names}
    seen = Counter([*taken, *titles.values()])
    return {name: title if seen[title] == 1 else name for name, title in titles.items()}


def _count(name: str) -> Cell:
    return lambda e: f"{e.totals.counts[name]:,}" if name in e.totals.counts else ""


def _statistic(name: str) -> Cell:
    written = number if name == "reward" else "{:.3g}".format
    return lambda e: written(e.statistics[name]) if name in e.statistics else ""


def _fitting(widths: dict[str, int], room: int) -> list[str]:
    """The columns that there is room for; those that say most are chosen first."""
    ranked = ["steps", "loss", "reward", "lr", "errors", "skipped", "not finite", "ties", "snr", "seconds", "cosine"]
    ranked += ["forwards", "grad norm", "backwards"]
    chosen = []
    for title in [title for title in ranked if title in widths] + [title for title in widths if title not in ranked]:
        if widths[title] <= room:
            chosen.append(title)
            room -= widths[title]
    return [title for title in widths if title in chosen]


# ---------------------------------------------------------------- numbers


def number(value: float) -> str:
    """Four digits after the point, unless it is large."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def short(value: float) -> str:
    """Three digits: 950, 12.3k, 5M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`4:05`, or `2:04:05`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
