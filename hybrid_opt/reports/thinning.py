"""Many points drawn as few: bins with their mean, least and most. Next: `loss_panels.py`.

One idea: a bin says what it leaves out. Its least and most are drawn as a band around its mean, and the caption names its size.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

from hybrid_opt.reports.content import Key, Series
from hybrid_opt.reports.wording import known

Item = TypeVar("Item")

MOST = 240
"""Points of a series that a panel shows."""


def bin_size(count: int, most: int = MOST) -> int:
    """Points in a bin, so that there are at most `most` bins."""
    return max(1, math.ceil(count / most))


def bins_of(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """`size` items one after another in each bin; the last one may have fewer."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def thinned(key: Key, x: Sequence[float], y: Sequence[float | None], size: int, form: str = "points") -> Series:
    """The known points as a series: all of them for `size` 1, otherwise bins of `size` points one after another.

    Binned `points` become a `faint` line.
    """
    points = [(at, value) for at, value in zip(x, y, strict=True) if known(at) and known(value)]
    if size == 1:
        return Series(key, tuple(at for at, _ in points), tuple(value for _, value in points), form=form)
    bins = bins_of(points, size)
    return Series(
        key,
        tuple(sum(at for at, _ in points) / len(points) for points in bins),
        tuple(sum(value for _, value in points) / len(points) for points in bins),
        tuple(min(value for _, value in points) for points in bins),
        tuple(max(value for _, value in points) for points in bins),
        form="faint" if form == "points" else form,
    )


def thinning_note(size: int) -> str:
    """What the caption says of it."""
    return "" if size == 1 else f" Each line joins means of {size:,} steps; the band reaches from least to most."
