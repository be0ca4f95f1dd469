"""Slopes along random directions (SPSA, MeZO). Next: `align.py`.

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
from hybrid_opt.estimators.pairs import curvatures
from hybrid_opt.estimators.probing import NoiseSum, Probe, added, nothing, pairs_of
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Objective
from hybrid_opt.perturbations.build import build_perturbation
from hybrid_opt.perturbations.contract import Member


class SpsaEstimator:
    """`g = 1/q sum_j s_j z_j` with slopes `s_j = (L(w + sigma z_j) - L(w - sigma z_j)) / (2 sigma)` along q directions z_j (Spall 1992;
    MeZO, arXiv 2305.17333).

    With `curvature_floor` f each slope is divided by `max(|c_j|, f)`, c_j the second difference `(L+ - 2 L0 + L-) / sigma^2`, so that a
    step is short where the loss bends, as with Newton's method in one dimension; the estimate then has the units of weights.

    A direction along which a loss is not finite counts for nothing, and the sum is still divided by q.
    """

    def __init__(self, config: Spsa) -> None:
        self.config = config
        self.perturbation = build_perturbation(config)

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`."""
        self.perturbation.check(engine, names)

    @torch.no_grad()
    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[NoiseSum, Cost]:
        """See `Estimator.estimate`; with `curvature_floor` adds the statistic `curvature`, the mean of c_j.

        Raises:
            UserError: see `Probe`.
        """
        sigma, floor = self.config.sigma, self.config.curvature_floor
        keys = [key.fold(j) for j in range(self.config.pairs)]
        perturbation = self.perturbation.ready(engine, names, keys, key)
        probe = Probe(self.config, engine, objective, batch, names, key)
        # By itself and first, so that the two of a pair still share their noise, which is kept from the last evaluation on.
        clean = probe(perturbation, [Member(keys[0], 0)]) if floor else None
        probed = probe(perturbation, pairs_of(keys), together=2)
        cost = added(clean.cost, probed.cost) if clean else probed.cost
        if cost.is_empty:
            return nothing(perturbation, keys), cost
        slopes, statistics = probed.slopes(sigma), {**cost.statistics, **probed.pair_statistics(sigma)}
        if clean:
            bends = curvatures(probed.means, clean.means[0], sigma)
            slopes = slopes / bends.abs().clamp(min=floor)
            statistics["curvature"] = bends[probed.known].mean().item()
        return NoiseSum(perturbation, keys, slopes / len(keys)), replace(cost, statistics=statistics)
