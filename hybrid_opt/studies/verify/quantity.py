"""One row of the table: a number that theory gives, and the same number measured. Next: `known_losses.py`.

One idea: a row passes if theory lies within the measurement's interval, and the interval is narrow enough that a wrong estimator would
lie outside.

Intervals are Student's, 4.5 standard errors to each side where there are many repeats. By Bonferroni's inequality all of up to 100 rows
of a right program pass together with probability 99.9 %.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats
from torch import Tensor

LEFT_OUT = 6.8e-6
"""Probability with which a right program's row lies outside its interval."""
RESOLUTION = 0.25
"""Half an interval is at most this share of what theory says. An estimate that is 1.3 times too long has 1.69 times the square."""

WHOLE_RESOLUTION = 0.5
"""The same for the cosine on a whole real model, where estimates are dear."""


@dataclass(frozen=True)
class Quantity:
    """A number in theory and measured."""

    name: str
    theory: float | None
    """None: measured only, there is no law to compare with."""
    measured: float
    low: float
    high: float
    """The interval; `low = high = measured` where nothing is random."""
    passed: bool | None
    """None where there is no law."""

    def row(self) -> dict[str, Any]:
        """For the JSON file."""
        values = asdict(self)
        return {"quantity": values.pop("name"), **values}


def exactly(name: str, theory: float, measured: float, tolerance: float = 0.0) -> Quantity:
    """A quantity in which nothing is random.

    Args:
        tolerance: largest difference that floating point explains; 0: bit for bit.
    """
    return Quantity(name, theory, measured, measured, measured, abs(measured - theory) <= tolerance)


def mean_of(name: str, theory: float, values: Tensor, resolution: float = RESOLUTION) -> Quantity:
    """The mean of independent values, (repeats,)."""
    return function_of_means(name, theory, values.view(-1, 1), lambda mean: mean[..., 0], resolution)


def function_of_means(
    name: str,
    theory: float | None,
    samples: Tensor,
    function: Callable[[Tensor], Tensor],
    resolution: float = RESOLUTION,
) -> Quantity:
    """A smooth function of means, such as the quotient of two; its standard error by the jackknife (Efron & Stein 1981).

    Args:
        samples: independent rows, (repeats, k).
        function: of means (..., k) to (...).
        resolution: most that half the interval may be, as a share of theory.
    """
    samples = samples.double()
    count, total = len(samples), samples.sum(dim=0)
    measured = function(total / count).item()
    without_one = function((total - samples) / (count - 1))
    error = ((without_one - without_one.mean()).square().sum() * (count - 1) / count).sqrt().item()
    half = float(stats.t.isf(LEFT_OUT / 2, count - 1)) * error
    passed = None if theory is None else abs(measured - theory) <= half <= resolution * abs(theory)
    return Quantity(name, theory, measured, measured - half, measured + half, passed)


def squared_cosine(means: Tensor) -> Tensor:
    """`E[<a, g>]^2 / E|a|^2`, of means of `<a, g> / |g|^2` and `|a|^2 / |g|^2`: the share of |g|^2 that the best multiple of a explains."""
    return means[..., 0].square() / means[..., 1]


def cosine(means: Tensor) -> Tensor:
    """`E<a, b> / sqrt(E|a|^2 E|b|^2)`, of means of these three, (..., 3)."""
    return means[..., 0] / (means[..., 1] * means[..., 2]).sqrt()


def error_of(samples: Tensor) -> Tensor:
    """`|a - g|^2 / |g|^2`, (repeats,), of `<a, g> / |g|^2` and `|a|^2 / |g|^2`, (repeats, 2)."""
    along, squared = samples.double().unbind(-1)
    return squared - 2 * along + 1
