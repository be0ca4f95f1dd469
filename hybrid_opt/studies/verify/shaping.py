"""What losses become on the way to coefficients. Next: `descent.py`.

One idea: a member's weight is read off the estimate's coefficients.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hybrid_opt.studies.verify.known_losses import Known, LinearLoss
from hybrid_opt.studies.verify.quantity import Quantity, exactly, function_of_means, mean_of
from hybrid_opt.studies.verify.sampling import DENSE, Trials, estimated, estimator_of

MEMBERS = 10
VALUES = 48


def second_moments(trials: Trials) -> Iterator[Quantity]:
    """Mean square of the members' weights: 1 for z-scores, `(N + 1) / (3 (N - 1))` for centred ranks, whatever the losses are."""
    laws = {"standardize": 1.0, "centered_rank": (MEMBERS + 1) / (3 * (MEMBERS - 1))}
    for shaping, law in laws.items():
        w = _weights(trials, shaping)
        yield exactly(f"mean square of weights, {shaping}", law, w.square().mean().item(), tolerance=1e-6)
        yield exactly(f"largest sum of weights, {shaping}", 0.0, w.sum(dim=1).abs().max().item(), tolerance=1e-6)


def _weights(trials: Trials, shaping: str) -> Tensor:
    """Weights of independent populations, (repeats, members)."""
    options = {"population_size": MEMBERS, "antithetic": False, "fitness_shaping": shaping, "perturbation": DENSE}
    known, estimator = Known(LinearLoss()), estimator_of(type="es", **options)
    estimates = [estimated(estimator, known, trials.key(repeat))[0] for repeat in range(10)]
    return MEMBERS * torch.stack([estimate.coefficients for estimate in estimates])


def loss_variance(trials: Trials) -> Iterator[Quantity]:
    """`E var(L_i) = sigma^2 |g|^2` over members at `w + sigma u_i`, with ddof = 1 (FZOO, arXiv 2506.09034)."""
    sigma, known = 0.5, Known(LinearLoss())
    form = {"type": "dense", "distribution": "rademacher"}
    options = {"population_size": MEMBERS, "antithetic": False, "fitness_shaping": "none", "perturbation": form}
    estimator = estimator_of(type="es", sigma=sigma, **options)
    spreads = [estimated(estimator, known, trials.key(repeat))[1].loss_spread for repeat in trials.repeats(400)]
    squared = torch.tensor(spreads).double().square() * MEMBERS / (MEMBERS - 1)
    yield mean_of("variance of losses / (sigma |g|)^2", 1.0, squared / (sigma * known.loss.gradient().norm()) ** 2)


def normalised_step(trials: Trials) -> Iterator[Quantity]:
    """The estimate of fzoo times s, the spread of the losses, has a mean square of `(n + N - 1)/N` times that of s, so a step is about
    `lr sqrt((n + N - 1)/N)` long however steep the loss is (FZOO, arXiv 2506.09034)."""
    known = Known(LinearLoss())
    estimator = estimator_of(type="fzoo", sigma=0.5, population_size=MEMBERS)
    rows = []
    for repeat in trials.repeats(400):
        estimate, cost = estimated(estimator, known, trials.key(repeat))
        squared, variance = known.read(estimate).double().square().sum(), cost.loss_spread**2
        rows.append([squared.item() * variance, variance])
    law = (VALUES + MEMBERS - 1) / MEMBERS
    yield function_of_means("squared length of fzoo", law, torch.tensor(rows), lambda mean: mean[..., 0] / mean[..., 1])
