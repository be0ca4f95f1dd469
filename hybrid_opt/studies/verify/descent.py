"""What a step does to a quadratic loss. Next: `independence.py`.

One idea: for a quadratic loss the slope of a pair is exact at any sigma, so what a step does follows from moments of its direction.
"""

from collections.abc import Iterator

import torch

from hybrid_opt import HybridOptimizer
from hybrid_opt.studies.verify.known_losses import Known, QuadraticLoss
from hybrid_opt.studies.verify.quantity import Quantity, mean_of
from hybrid_opt.studies.verify.sampling import DENSE, Trials, estimated, estimator_of


def one_step_descent(trials: Trials) -> Iterator[Quantity]:
    """A step of MeZO with learning rate eta changes a quadratic loss by `-eta |g|^2 + eta^2/2 (|g|^2 tr H + 2 g.Hg)` in the mean
    (arXiv 2305.17333, lemma 3, with Gaussian directions and without the remainder)."""
    loss = QuadraticLoss()
    g = loss.gradient()
    squared, curved = g.square().sum().item(), (loss.h * g.square()).sum().item()
    growth = squared * loss.h.sum().item() + 2 * curved
    rate = squared / growth  # where the mean is lowest
    spsa = {"type": "spsa", "learning_rate": rate, "sigma": 0.1, "perturbation": DENSE}
    document = {"estimators": {"spsa": spsa}, "schedule": {"type": "single", "estimator": "spsa"}}
    hybrid = HybridOptimizer(loss, lambda model, batch: model(batch), schedule=document, seed=trials.seed)
    start, batch, changes = loss.w.detach().clone(), loss.batch(), []
    before = loss(batch).item()
    for _ in trials.repeats(1800):
        hybrid.step(batch)
        changes.append(loss(batch).item() - before)
        loss.w.data.copy_(start)
    law = -rate * squared + rate**2 / 2 * growth
    yield mean_of("change of a quadratic by a step of MeZO", law, torch.tensor(changes))


def curvature(trials: Trials) -> Iterator[Quantity]:
    """`(L(w + sigma z) - 2 L(w) + L(w - sigma z)) / sigma^2 = z.Hz`, whose mean is the trace of H."""
    known = Known(QuadraticLoss())
    estimator = estimator_of(type="spsa", sigma=0.3, pairs=4, curvature_floor=1.0, perturbation=DENSE)
    costs = [estimated(estimator, known, trials.key(repeat))[1] for repeat in trials.repeats(200)]
    found = torch.tensor([cost.statistics["curvature"] for cost in costs])
    yield mean_of("curvature along directions of spsa", known.loss.h.sum().item(), found)
