"""Layers of the same shape get noise of their own. Next: `exactness.py`.

One idea: the sum of L independent directions is sqrt(L) times as long as each; of L equal ones it is L times.
"""

from collections.abc import Iterator

import torch

from hybrid_opt.studies.verify.known_losses import Known, LinearLoss
from hybrid_opt.studies.verify.quantity import Quantity, function_of_means
from hybrid_opt.studies.verify.sampling import DENSE, Trials, estimator_of

LAYERS = 24


def same_shaped_layers(trials: Trials) -> Iterator[Quantity]:
    """`E|sum_l z_l|^2 = sum_l E|z_l|^2` for the noise z_l of 24 layers of one shape. With noise drawn by shape alone it is 24 times that."""
    for form in (DENSE, {"type": "low_rank", "noise_rank": 1}):
        yield _sum_of_layers(trials, form)


def members_and_steps(trials: Trials) -> Iterator[Quantity]:
    """The same for the noise of one layer for 24 directions, of one step and of as many steps."""
    known = Known(LinearLoss())
    perturbation = estimator_of(type="spsa", perturbation=DENSE).perturbation
    for what, by_step in (("members", False), ("steps", True)):
        rows = []
        for repeat in trials.repeats(300):
            keys = [
                trials.key(repeat * LAYERS + i).fold(0) if by_step else trials.key(repeat).fold(i)
                for i in range(LAYERS)
            ]
            z = torch.stack([known.direction(perturbation, key) for key in keys])
            rows.append(torch.stack([z.sum(0).square().sum(), z.square().sum()]))
        yield _quotient(f"|sum of noise|^2 / sum of |noise|^2, {LAYERS} {what}", torch.stack(rows))


def _sum_of_layers(trials: Trials, form: dict) -> Quantity:
    known = Known(LinearLoss(layers=LAYERS))
    perturbation, rows = estimator_of(type="spsa", perturbation=form).perturbation, []
    for repeat in trials.repeats(300):
        z = known.direction(perturbation, trials.key(repeat).fold(0)).view(LAYERS, -1)
        rows.append(torch.stack([z.sum(0).square().sum(), z.square().sum()]))
    return _quotient(f"|sum of noise|^2 / sum of |noise|^2, {LAYERS} layers, {form['type']}", torch.stack(rows))


def _quotient(name: str, samples: torch.Tensor) -> Quantity:
    return function_of_means(name, 1.0, samples, lambda mean: mean[..., 0] / mean[..., 1])
