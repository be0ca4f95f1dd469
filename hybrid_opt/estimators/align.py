"""Slopes along random directions, put together by least squares. Next: `fzoo.py`, then `backprop.py`.

One idea: q slopes say exactly what the gradient is within the span of q directions, so that is what the estimate is; the mean of directions
times slopes says it only on average.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from hybrid_opt.config.align import Align
from hybrid_opt.engines.contract import Engine
from hybrid_opt.engines.inner_products import inner_products
from hybrid_opt.estimators.contract import Cost
from hybrid_opt.estimators.probing import NoiseSum, Probe, nothing, pairs_of
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Objective
from hybrid_opt.perturbations.build import build_perturbation
from hybrid_opt.perturbations.gram import cholesky


class AlignEstimator:
    """`g = Z^T K^-1 s`, with q directions Z (q, n), their Gram matrix `K = Z Z^T` and slopes `s_j = (L+_j - L-_j) / (2 sigma)`.

    For small sigma `s = Z grad`, and this is the orthogonal projection of the gradient onto the directions' span: the g of least norm that
    has these slopes. Directions that are isotropic give `MSE / |grad|^2 = 1 - q/n` and `E cos^2 = q/n`. With orthogonal directions of
    length sqrt(n) it is `spsa`'s estimate times q/n. K is solved by Cholesky in float64. A direction along which a loss is not
    finite is left out: the projection is onto the span of the others.
    """

    def __init__(self, config: Align) -> None:
        self.config = config
        self.perturbation = build_perturbation(config)

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`."""
        self.perturbation.check(engine, names)

    @torch.no_grad()
    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[NoiseSum, Cost]:
        """See `Estimator.estimate`.

        Raises:
            UserError: see `Probe`; or the directions are not independent, because there are more than values that they move.
        """
        keys = [key.fold(j) for j in range(self.config.pairs)]
        perturbation = self.perturbation.ready(engine, names, keys, key)
        probed = Probe(self.config, engine, objective, batch, names, key)(perturbation, pairs_of(keys), together=2)
        if probed.cost.is_empty:
            return nothing(perturbation, keys), probed.cost
        # After the evaluation, which decides what noise each parameter gets.
        gram = inner_products(engine, names, [NoiseSum(perturbation, [k], torch.ones(1)) for k in keys])
        values = perturbation.dimension(engine, names)
        coefficients, known = torch.zeros(len(keys), dtype=torch.float64), probed.known
        slopes = probed.slopes(self.config.sigma)[known, None]
        coefficients[known] = torch.cholesky_solve(slopes, cholesky(gram[known][:, known], values))[:, 0]
        statistics = {**probed.cost.statistics, **probed.pair_statistics(self.config.sigma)}
        return NoiseSum(perturbation, keys, coefficients), replace(probed.cost, statistics=statistics)
