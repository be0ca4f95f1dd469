"""The cosine that an estimator's configuration promises on a linear loss. Next: `writing.py`.

One idea: `E<a, g> = |g|^2` on every part of the weights, so only the second moment of the estimate a depends on the noise's form. On a
part P of the n weights with n_P of them and the share rho of |g|^2, with q directions,

    cos^2 = 1 / (1 + D/q),  D = n_P / rho + 1 + (2 / |g_P|^2) sum_W |g_W|^2 (m + n + 1)/r

for Gaussian noise, the sum over the matrices W (m, n) of the part that have noise of rank r; `D = n_P / rho - 1` for Rademacher noise,
and `D = (n_P / rho + 2) n / (n + 2) - 1` on the sphere. On the whole D is the effective dimension: `n + 1` for dense Gaussian noise.
(Fourth moments, by Isserlis' theorem.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from hybrid_opt.config.estimators import Estimator
from hybrid_opt.config.forward_gradient import ForwardGradient
from hybrid_opt.config.probing import EvolutionStrategy, Spsa


@dataclass(frozen=True)
class Part:
    """Some of the weights."""

    tensors: Sequence[tuple[tuple[int, ...], float]]
    """Shape of each parameter, and the squared norm of its gradient."""

    @property
    def values(self) -> int:
        """Number of weights."""
        return sum(prod(shape) for shape, _ in self.tensors)

    @property
    def energy(self) -> float:
        """Squared norm of the gradient."""
        return sum(energy for _, energy in self.tensors)


def directions_of(config: Estimator) -> int | None:
    """q, where an estimate is a mean over independent directions of slope times direction."""
    match config:
        case ForwardGradient():
            return config.tangents
        case Spsa() if config.curvature_floor is None:
            return config.pairs
        case EvolutionStrategy() if (
            config.antithetic and config.group_baseline == "none" and not config.distinct_examples
        ):
            return config.directions  # shaping changes the estimate's length, and its direction by 1/(4q) or 2 %
    return None


def expected_dimension(config: Estimator, part: Part, whole: Part) -> float | None:
    """D of a part, or None where there is no law."""
    sees_all = not config.wrappers and getattr(config, "examples_per_step", None) is None
    if directions_of(config) is None or not sees_all:
        return None
    form = _form(config)
    spread = part.values * whole.energy / part.energy
    if form == "rademacher":
        return spread - 1
    if form == "sphere":  # Gaussian directions, all of the same length
        return (spread + 2) * whole.values / (whole.values + 2) - 1
    if form == "gaussian":
        return spread + 1
    if form == "low_rank" and config.perturbation.otherwise == "refuse":
        matrices = [(shape, energy) for shape, energy in part.tensors if len(shape) == 2]
        rank = config.perturbation.noise_rank
        excess = sum(energy * 2 * (sum(shape) + 1) / rank for shape, energy in matrices)
        return spread + 1 + excess / part.energy
    return None


def expected_cosine(config: Estimator, part: Part, whole: Part) -> float | None:
    """The cosine on a part, or None where there is no law."""
    dimension = expected_dimension(config, part, whole)
    return None if dimension is None else (1 + dimension / directions_of(config)) ** -0.5


def _form(config: Estimator) -> str:
    if isinstance(config, ForwardGradient):
        return config.distribution
    form = config.perturbation
    return form.distribution if form.type == "dense" else form.type
