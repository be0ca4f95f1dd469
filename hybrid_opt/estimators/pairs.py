"""What the losses of antithetic pairs say. Next: `spsa.py`.

One idea: of the two losses of a pair, the odd part is what a slope makes, and the even part is what curvature and noise make.
"""

from torch import Tensor


def odd_and_even(losses: Tensor) -> tuple[Tensor, Tensor]:
    """`(L+ - L-)/2` and `(L+ + L-)/2` of each pair, (pairs,) float64; losses: (members,), the two of a pair side by side."""
    pairs = losses.double().view(-1, 2)
    return (pairs[:, 0] - pairs[:, 1]) / 2, pairs.mean(dim=1)


def curvatures(losses: Tensor, clean: Tensor, sigma: float) -> Tensor:
    """`(L+ - 2 L0 + L-) / sigma^2`, for a quadratic loss with Hessian H the value `z^T H z` of each pair's direction z.

    Args:
        losses: (members,), the two of a pair side by side.
        clean: L0, the loss at the weights as they are, ().

    Returns:
        (pairs,) float64.
    """
    return 2 * (odd_and_even(losses)[1] - clean.double()) / sigma**2


def pair_statistics(losses: Tensor, sigma: float) -> dict[str, float]:
    """What antithetic losses tell of the estimate; losses: (members,), the two of a pair side by side.

    `gradient_norm = sqrt(mean_j ((L+_j - L-_j) / (2 sigma))^2)`, for a linear loss the norm of the gradient, without bias in its
    square. `snr`, from three pairs on: the variance of the pairs' odd parts `(L+ - L-)/2`, which the estimate is made of, over that
    of their even parts `(L+ + L-)/2`, in which curvature and, with distinct_examples, the choice of examples show.
    The correlation of antithetic losses is `(1 - snr) / (1 + snr)`.
    """
    odd, even = odd_and_even(losses)
    statistics = {"gradient_norm": (odd / sigma).square().mean().sqrt().item()}
    if len(odd) > 2 and (noise := even.var().item()) > 0:
        statistics["snr"] = odd.square().mean().item() / noise
    return statistics
