"""Along which directions to probe, and what their slopes say. Next: `directions.py`.

One idea: each direction is `eps_i = a_i z_i + U b_i`, some noise and something of the guides' span U, so a form of the estimator is a
choice of the numbers a and b and of each slope's weight.

Throughout, n is the number of weights, P of pairs, k of guides, and slope_i = (L(w + sigma eps_i) - L(w - sigma eps_i)) / (2 sigma).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_opt.estimators.noise import Key, gaussian


@dataclass(frozen=True)
class ExactDesign:
    """k pairs along `l u_j`, P - k along noise at right angles to all u; the latter's estimate is shrunk.

    `g = sum_j u_j (u_j . grad) + c / (P - k) sum_i slope_i eps_i`, with `c = (P - k) / (P - k + n - k + 1)`. For a linear loss
    `E|g - grad|^2 = (1 - rho^2) (1 - c) |grad|^2`, rho^2 the share of |grad|^2 in the span of u, and no other c gives less.
    """

    noise_in_span: Tensor
    """`<z_i, u_j>`, (P, k) float64."""
    values: int
    """n."""
    length: float
    """l, so that a probe along a guide moves the weights by `sigma l`. A random one moves them by `sigma sqrt(n)`, which along a
    gradient is too far: the loss is curved there as it is along no random direction."""
    scale: float = 1.0
    """Factor of the estimate."""

    @property
    def noise(self) -> Tensor:
        """a (P,)."""
        pairs, guides = self.noise_in_span.shape
        return torch.cat([torch.zeros(guides), torch.ones(pairs - guides)]).double()

    @property
    def along(self) -> Tensor:
        """b (P, k)."""
        guides = self.noise_in_span.shape[1]
        return torch.cat([torch.eye(guides).double() * self.length, -self.noise_in_span[guides:]])

    def coefficients(self, slopes: Tensor) -> Tensor:
        """Of each direction in the estimate, (P,)."""
        pairs, guides = self.noise_in_span.shape
        random = pairs - guides
        shrinking = random / (random + self.values - guides + 1)
        weights = torch.cat(
            [torch.full((guides,), self.length**-2), torch.full((random,), shrinking / random)]
        ).double()
        return self.scale * weights * slopes

    def energies(self, slopes: Tensor) -> tuple[float, float]:
        """|gradient|^2 in the guides' span and outside, neither with bias: `sum_j slope_j^2 / l^2` and the mean of the others'."""
        guides = self.noise_in_span.shape[1]
        inside = slopes[:guides].square().sum() / self.length**2
        return inside.item(), slopes[guides:].square().mean().item()


@dataclass(frozen=True)
class MixedDesign:
    """Every direction from `N(0, S)`, `S = alpha 1 + (1 - alpha) n/k U U^T`, whose trace is n, so that sigma is a weight's.

    `g = beta / (P lambda) sum_i slope_i eps_i`, `lambda = alpha + (1 - alpha) n/k`. For a linear loss `E[g] = beta / lambda S grad`:
    beta times the gradient in the guides' span, and alpha / lambda of that outside. Guided ES (arXiv 1806.10230) has the covariance
    S / n, and its estimate is this one where its beta is n / lambda times this one.
    """

    noise_in_span: Tensor
    """`<z_i, u_j>`, (P, k) float64."""
    values: int
    """n."""
    in_span: Tensor
    """Standard normal values, (P, k) float64."""
    alpha: float
    beta: float

    @property
    def _largest(self) -> float:
        """lambda, the eigenvalue of S in the guides' span."""
        return self.alpha + (1 - self.alpha) * self.values / self.in_span.shape[1]

    @property
    def noise(self) -> Tensor:
        """a (P,)."""
        return torch.full((len(self.in_span),), self.alpha**0.5, dtype=torch.float64)

    @property
    def along(self) -> Tensor:
        """b (P, k)."""
        return ((1 - self.alpha) * self.values / self.in_span.shape[1]) ** 0.5 * self.in_span

    def coefficients(self, slopes: Tensor) -> Tensor:
        """Of each direction in the estimate, (P,)."""
        return self.beta / (len(slopes) * self._largest) * slopes

    def energies(self, slopes: Tensor) -> tuple[float, float]:
        """|gradient|^2 in the guides' span and outside, neither with bias, by least squares.

        With `x_i = U^T eps_i` known, `slope_i = x_i . U^T grad + sqrt(alpha) |rest| e_i` with standard normal e: the squared
        residuals over P - k tell the rest, and the fit's square exceeds the span's by `trace (X^T X)^-1` of their mean.
        """
        known = self.noise[:, None] * self.noise_in_span + self.along
        inverse = torch.linalg.pinv(known.T @ known)
        fit = inverse @ (known.T @ slopes)
        rest = (slopes - known @ fit).square().sum() / (len(slopes) - len(fit))
        inside = fit.square().sum() - rest * inverse.trace()
        return inside.item(), (rest / self.alpha).item()


def standard_normal(keys: Sequence[Key], guides: int) -> Tensor:
    """The part of each direction that lies in the guides' span, (keys, guides) float64."""
    return gaussian([key.fold("guides") for key in keys], 0, guides, torch.device("cpu")).double()
