"""Fitness shaping: members' losses become the weights w of their noise directions. Next: `perturbation.py`."""

from collections.abc import Callable

import torch
from torch import Tensor


def none(losses: Tensor) -> Tensor:
    """`w = losses`, (members,) float64."""
    return losses.double()


def standardize(losses: Tensor) -> Tensor:
    """`w = (losses - mean) / (std + 1e-8)` with the population's standard deviation (EA4LLM, arXiv 2510.10603)."""
    losses = losses.double()
    return (losses - losses.mean()) / (losses.std(correction=0) + 1e-8)


def leave_one_out(losses: Tensor) -> Tensor:
    """`w_i = L_i - mean_{j != i} L_j = N/(N - 1) (L_i - mean L)`: what a member's loss differs from that of the others.

    Without antithetic pairs the others' losses do not depend on the member's direction, so the estimate has no bias (RLOO, arXiv
    2402.14740). With pairs the two of a pair share their direction, and the estimate is that of `none` times N/(N - 1).
    """
    losses = losses.double()
    return (losses - losses.mean()) * (len(losses) / (len(losses) - 1))


def centered_rank(losses: Tensor) -> Tensor:
    """`w = 2 rank / (N - 1) - 1` in [-1, 1], rank 0 for the lowest loss; equal losses share their mean rank.

    The mean square of the weights is (N + 1) / (3 (N - 1)) when no losses are equal.
    """
    _ordered, inverse, counts = torch.unique(losses.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0) - 1
    rank = last.double() - (counts - 1) / 2
    return 2 * rank[inverse] / (len(losses) - 1) - 1


FITNESS_SHAPING: dict[str, Callable[[Tensor], Tensor]] = {
    "none": none,
    "standardize": standardize,
    "leave_one_out": leave_one_out,
    "centered_rank": centered_rank,
}
