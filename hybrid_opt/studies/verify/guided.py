"""Probes along what backprop left behind, against their laws. Next: `guided_toy.py`.

One idea: a guide u with a known share `rho^2 = cos(u, g)^2` of the gradient g is shown to the estimator as backprop would.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.engines.local import Gradients
from hybrid_opt.estimators.contract import Estimator
from hybrid_opt.studies.verify.known_losses import Known, LinearLoss
from hybrid_opt.studies.verify.quantity import Quantity, error_of, exactly, function_of_means, mean_of
from hybrid_opt.studies.verify.sampling import DENSE, Trials, estimated, estimator_of

PAIRS = 6
VALUES = 48


def exact_probes(trials: Trials) -> Iterator[Quantity]:
    """One exact probe along a guide and P - 1 shrunk random ones: `E|a - g|^2 / |g|^2 = (1 - rho^2)(1 - c)`,
    `c = (P - k) / (P - k + n - k + 1)`, k guides. A whole gradient as guide leaves nothing."""
    c = (PAIRS - 1) / (PAIRS - 1 + VALUES - 1 + 1)
    for rho2 in (0.2, 0.7):
        samples = _with_guide(trials, 150, rho2, form={"type": "exact"})
        yield mean_of(f"MSE of guided, exact, rho^2 = {rho2}", (1 - rho2) * (1 - c), error_of(samples))
    worst = error_of(_with_guide(Trials(trials.seed, 0.0), 0, 1.0, form={"type": "exact"})).abs().max().item()
    yield exactly("largest error of guided, exact, where the guide is g", 0.0, worst, tolerance=1e-5)


def mixed_covariance(trials: Trials) -> Iterator[Quantity]:
    """Directions from `N(0, S)`, `S = alpha 1 + (1 - alpha) n/k U U^T` (Guided ES, arXiv 1806.10230, section 3.2): the estimate's mean
    is `beta/lambda S g`, lambda = alpha + (1 - alpha) n/k, and its variance `(beta/lambda)^2 (|S g|^2 + g.Sg tr S) / P`."""
    rho2, alpha, beta = 0.4, 0.9, 0.8
    largest = alpha + (1 - alpha) * VALUES
    factor = beta / largest
    bias = rho2 * (beta - 1) ** 2 + (1 - rho2) * (factor * alpha - 1) ** 2
    squared, form = (rho2 * largest**p + (1 - rho2) * alpha**p for p in (2, 1))
    variance = factor**2 * (squared + form * VALUES) / PAIRS
    known, guide, show = _guided_loss(rho2)
    g = known.loss.gradient().double()
    along, rest = (g @ guide) * guide, g - (g @ guide) * guide
    estimator = estimator_of(
        type="guided", pairs=PAIRS, form={"type": "mixed_covariance", "alpha": alpha, "beta": beta}
    )
    rows = []
    for repeat in trials.repeats(600):
        show(estimator)
        a = known.read(estimated(estimator, known, trials.key(repeat))[0]).double()
        rows.append(torch.stack([a @ along / (along @ along), a @ rest / (rest @ rest), a @ a / (g @ g)]))

    def squared_bias(mean: Tensor) -> Tensor:
        return rho2 * (mean[..., 0] - 1) ** 2 + (1 - rho2) * (mean[..., 1] - 1) ** 2

    def spread(mean: Tensor) -> Tensor:
        return mean[..., 2] - rho2 * mean[..., 0].square() - (1 - rho2) * mean[..., 1].square()

    yield function_of_means("squared bias of guided, mixed covariance", bias, torch.stack(rows), squared_bias)
    yield function_of_means("variance of guided, mixed covariance", variance, torch.stack(rows), spread)


def threshold(trials: Trials) -> Iterator[Quantity]:
    """P probes within the span of k guides and P random ones explain as much of |g|^2 where `rho^2 = (P + k + 1) / (P + n + 1)`.

    The best multiple of an estimate explains `rho^2 P / (P + k + 1)` in the span and `P / (P + n + 1)` everywhere.
    """
    rho2 = (PAIRS + 1 + 1) / (PAIRS + VALUES + 1)
    inside = _with_guide(trials, 500, rho2, form={"type": "mixed_covariance", "alpha": 1e-9})
    everywhere = trials.of_linear(500, type="spsa", pairs=PAIRS, perturbation=DENSE)

    def quotient(mean: Tensor) -> Tensor:
        in_span, plain = mean[..., 0].square() / mean[..., 1], mean[..., 2].square() / mean[..., 3]
        return in_span / plain

    yield function_of_means(
        "explained in the span / by plain ES, rho^2 at the threshold", 1.0, torch.cat([inside, everywhere], 1), quotient
    )


def _with_guide(trials: Trials, full: int, rho2: float, **options: Any) -> Tensor:
    """`along_and_squared` of guided ES that has seen one gradient with this share of the loss's, before each estimate anew."""
    known, _, show = _guided_loss(rho2)
    estimator = estimator_of(type="guided", pairs=PAIRS, **options)
    return trials.along_and_squared(full, known, estimator, before=lambda: show(estimator))


def _guided_loss(rho2: float) -> tuple[Known, Tensor, Callable[[Estimator], None]]:
    """A linear loss, a unit vector u with `cos(u, g)^2 = rho2`, and what shows 3 u as a gradient."""
    known = Known(LinearLoss())
    g = known.loss.gradient().double()
    other = torch.randn(VALUES, generator=torch.Generator().manual_seed(11)).double()
    other -= (other @ g) / (g @ g) * g
    guide = rho2**0.5 * g / g.norm() + (1 - rho2) ** 0.5 * other / other.norm()
    shape = known.engine.parameters[known.names[0]].shape
    gradient = Gradients({known.names[0]: 3 * guide.float().view(shape)})
    return known, guide, lambda estimator: estimator.follow(known.engine, gradient, known.names)
