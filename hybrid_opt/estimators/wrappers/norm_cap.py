"""Estimates of limited length. Next: `relative_sigma.py`.

One idea: the length of an estimate is known only when all of it has been read once, so it is read once more to be applied.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from hybrid_opt.config.wrappers import NormCap
from hybrid_opt.engines.contract import Engine
from hybrid_opt.engines.inner_products import inner_products
from hybrid_opt.estimators.contract import Cost, Estimate, Estimator, WeightedSum
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Objective


class NormCapEstimator:
    """`g min(1, c / |g|)` for the inner estimate g over all its parameters, on all ranks, and the largest norm c."""

    def __init__(self, inner: Estimator, config: NormCap) -> None:
        self.inner = inner
        self.norm = config.norm

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`."""
        self.inner.check(engine, names)

    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[Estimate, Cost]:
        """See `Estimator.estimate`; adds the statistic `estimate_norm`, the norm before it is capped."""
        estimate, cost = self.inner.estimate(engine, objective, batch, names, key)
        norm = inner_products(engine, names, [estimate]).sqrt().item()
        cost = replace(cost, statistics={**cost.statistics, "estimate_norm": norm})
        return (estimate if norm <= self.norm else WeightedSum([(self.norm / norm, estimate)])), cost
