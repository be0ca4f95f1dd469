"""The toy problem of Guided ES: a gradient that is wrong, and probes that know it. Next: `shaping.py`.

One idea: who follows a biased gradient ends where the bias outweighs the slope; who takes it for a guide goes on, and needs fewer probes
than who ignores it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Contribution
from hybrid_opt.engines.local import Gradients
from hybrid_opt.engines.update_rules import Sgd
from hybrid_opt.noise.drawing import gaussian
from hybrid_opt.noise.keys import Key
from hybrid_opt.studies.verify.known_losses import Known, LeastSquares
from hybrid_opt.studies.verify.quantity import Quantity, exactly
from hybrid_opt.studies.verify.sampling import DENSE, Trials, estimated, estimator_of

VALUES, ITERATIONS, PAIRS, RUNS = 200, 60, 2, 10
RATES = {"guided": 0.5, "sgd": 0.03, "spsa": 0.5 * PAIRS / (PAIRS + VALUES + 1)}
"""That of plain ES is as far below that of guided ES, whose estimate is shrunk, as is best for its variance."""


def published_toy(trials: Trials) -> Iterator[Quantity]:
    """With the gradient `g + |g| (b + 1.5 u_t)`, b and u_t random unit vectors of which b stays, least squares end lower by guided ES than
    by SGD, and by SGD lower than by plain ES (arXiv 1806.10230, figure 1 and its demo), here with 200 weights and after 60 iterations."""
    ordered = 0
    for run in range(RUNS):
        guided, sgd, plain = (_final_loss(kind, trials, run) for kind in ("guided", "sgd", "spsa"))
        ordered += guided < sgd < plain
    yield exactly(f"runs of {RUNS} in which guided ES < SGD < plain ES", RUNS, ordered)


def _final_loss(kind: str, trials: Trials, run: int) -> float:
    known, key = Known(LeastSquares(VALUES, trials.seed * RUNS + run)), trials.key(run)
    options = {"pairs": PAIRS, "sigma": 0.01, "perturbation": DENSE}
    estimator = None if kind == "sgd" else estimator_of(type=kind, **options)
    bias = _unit(key.fold("bias"))
    for iteration in range(ITERATIONS):
        g = known.loss.gradient()
        wrong = Gradients({"w": g + g.norm() * (bias + 1.5 * _unit(key.fold("noise", iteration)))})
        if kind == "guided":
            estimator.follow(known.engine, wrong, known.names)
        step = trials.key(run * ITERATIONS + iteration)
        estimate = wrong if kind == "sgd" else estimated(estimator, known, step)[0]
        known.engine.apply([Contribution(estimate, 1.0, known.names, RATES[kind], Sgd())], iteration)
    return known.loss(known.batch).item()


def _unit(key: Key) -> Tensor:
    values = gaussian([key], 0, VALUES, torch.device("cpu"))[0]
    return values / values.norm()
