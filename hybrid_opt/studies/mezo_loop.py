"""MeZO's loop, written from its paper's description: the rival that `bench.py` times. Next: `bench_rows.py`.

One idea: weights are moved in place along noise that a seed brings back, so nothing is held besides the weights; the price
is drawing the noise of every weight four times for each pair of forward passes.
Source: MeZO (Malladi et al. 2023, arXiv 2305.17333), algorithm 1, and its n-SPSA for more than one pair.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.inference_mode()
def mezo_step(
    parameters: Sequence[Tensor],
    loss: Callable[[], Tensor],
    seeds: Sequence[int],
    sigma: float,
    learning_rate: float,
) -> list[float]:
    """`w <- w - learning_rate / q * sum_j g_j z_j` with `g_j = (L(w + sigma z_j) - L(w - sigma z_j)) / (2 sigma)`.

    Args:
        parameters: the weights, changed in place; in floating point they come back from a pair not quite as they were.
        loss: the loss at the current weights, a scalar.
        seeds: one for each of the q pairs; z_j is drawn from torch's global generator after seeding it with seed j.

    Returns:
        The projected gradients g_j, one a pair.
    """
    gradients = [_projected_gradient(parameters, loss, seed, sigma) for seed in seeds]
    for seed, gradient in zip(seeds, gradients, strict=True):
        _move(parameters, seed, -learning_rate * gradient / len(seeds))
    return gradients


def _projected_gradient(parameters: Sequence[Tensor], loss: Callable[[], Tensor], seed: int, sigma: float) -> float:
    _move(parameters, seed, sigma)
    plus = loss()
    _move(parameters, seed, -2 * sigma)
    minus = loss()
    _move(parameters, seed, sigma)
    return ((plus - minus) / (2 * sigma)).item()


def _move(parameters: Sequence[Tensor], seed: int, distance: float) -> None:
    """`w <- w + distance * z`, z drawn parameter by parameter."""
    torch.manual_seed(seed)
    for weights in parameters:
        weights.add_(torch.randn_like(weights), alpha=distance)
