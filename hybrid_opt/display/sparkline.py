"""Curves and strips of block characters. Next: `dashboard_lines.py`, where they stand."""

from collections.abc import Sequence
from itertools import pairwise

from rich.text import Text

EIGHTHS = " ▁▂▃▄▅▆▇█"
COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")
"""Of estimators, in the order in which they appear."""


def columns(values: Sequence[float], width: int) -> list[float]:
    """The values, averaged to at most `width` of them."""
    count = len(values)
    if count <= width:
        return list(values)
    cuts = [i * count // width for i in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]


def sparkline(heights: Sequence[float], rows: int = 1) -> list[str]:
    """Bars side by side, in so many rows of characters from the top; the lowest value still shows."""
    low, high = min(heights, default=0.0), max(heights, default=0.0)
    steps = 8 * rows - 1
    levels = [1 + round(steps * (value - low) / (high - low)) if high > low else 1 for value in heights]
    return ["".join(EIGHTHS[min(max(level - 8 * row, 0), 8)] for level in levels) for row in reversed(range(rows))]


def strip(actors: Sequence[tuple[str, ...]], colours: dict[str, str], colourless: bool = False) -> Text:
    """A cell for each step in the colour of who acted; of two who acted together each has half of it.

    Without colours it is the first letter.
    """
    text = Text()
    for who in actors:
        if colourless:
            text.append(who[0][:1])
        elif len(who) == 1:
            text.append("▄", colours[who[0]])
        else:
            text.append("▄", f"{colours[who[1]]} on {colours[who[0]]}")
    return text
