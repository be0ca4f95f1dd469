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
    "centered_rank": centered_rank,
}
