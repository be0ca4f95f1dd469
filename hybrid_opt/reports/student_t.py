"""Means with 95 % intervals by Student's t. Next: `mean_curves.py`.

One idea: an interval over seeds needs at least two of them, and none is made up for one.
"""

import math
from collections.abc import Sequence

QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
"""The .975 quantiles for 1, 2, ... 30 degrees of freedom."""


def t_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean, and the ends of its 95 % interval; None for both with a single value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = _quantile(n - 1) * deviation / math.sqrt(n)
    return mean, mean - half, mean + half


def _quantile(freedom: int) -> float:
    z = 1.959964
    # Beyond the table the expansion around the normal quantile is right to four digits.
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1]
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
