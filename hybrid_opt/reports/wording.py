"""How numbers become text in reports. Next: `content.py`.

One idea: as many digits as mean something, and nothing at all for what is not known.
"""

import math
from typing import Any


def known(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def text_of(value: Any) -> str:
    """A text as it is; nothing for None."""
    return "" if value is None else str(value)


def number(value: float | None) -> str:
    """Three digits, or all before the point."""
    if not known(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def count(value: float | None) -> str:
    """A whole number; the mean of some may have a fraction."""
    if not known(value):
        return ""
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:.1f}"


def measure(value: float | None) -> str:
    """Four decimals, as training prints losses and accuracies."""
    if not known(value):
        return ""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.3e}"


def signed(value: float | None) -> str:
    """A change, with its sign."""
    return f"{value:+.4f}" if known(value) else ""


def size(value: float | None) -> str:
    """Bytes in megabytes or gigabytes."""
    if not known(value):
        return ""
    return f"{value / 1e9:,.1f} GB" if value >= 1e10 else f"{value / 1e6:,.0f} MB"


def duration(seconds: float | None) -> str:
    """Seconds, minutes, hours or days, at least two of them."""
    if not known(seconds):
        return ""
    for unit, each, decimals in (("d", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 2 * each:
            return f"{seconds / each:.{decimals}f} {unit}"
    return f"{number(seconds)} s"


def short(value: float, _position: int = 0) -> str:
    """A number at a tick of an axis."""
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power and (power > 1e3 or abs(value) >= 1e4):
            return f"{value / power:g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def with_interval(mean: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    """`0.343 ± 0.033`: the half width of the interval has two digits, and the mean as many decimals; without one, the mean alone."""
    if not known(mean):
        return ""
    if not (known(low) and known(high)):
        return signed(mean) if sign else measure(mean)
    half = (high - low) / 2
    decimals = 4 if half <= 0 else min(4, max(0, 1 - math.floor(math.log10(half))))
    return f"{mean:{sign}.{decimals}f} ± {half:.{decimals}f}"
