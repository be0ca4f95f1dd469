"""Slopes along random directions (SPSA, MeZO). Next: `backprop.py`.

One idea: two losses at opposite points of a direction tell the slope along it, and the gradient is estimated as the mean of directions
times slopes.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from hybrid_opt.config.probing import Spsa
from hybrid_opt.engines.contract import Engine
from hybrid_opt.estimators.contract import Cost
from hybrid_opt.estimators.noise import StepKey
from hybrid_opt.estimators.pairs import odd_and_even, pair_statistics
from hybrid_opt.estimators.probing import NoiseSum, Probe, build_perturbation, pairs_of
from hybrid_opt.objectives.contract import Objective


class SpsaEstimator:
    """`g = 1/q sum_j (L(w + sigma z_j) - L(w - sigma z_j)) / (2 sigma) z_j` with q pairs (Spall 1992; MeZO, arXiv 2305.17333)."""

    def __init__(self, config: Spsa):
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
            UserError: see `Probe`.
        """
        keys = [key.fold(j) for j in range(self.config.pairs)]
        perturbation = self.perturbation.ready(engine, names, keys, key)
        probed = Probe(self.config, engine, objective, batch, names, key)(perturbation, pairs_of(keys), together=2)
        slopes = odd_and_even(probed.means)[0] / self.config.sigma
        statistics = {**probed.cost.statistics, **pair_statistics(probed.means, self.config.sigma)}
        return NoiseSum(perturbation, keys, slopes / len(keys)), replace(probed.cost, statistics=statistics)
