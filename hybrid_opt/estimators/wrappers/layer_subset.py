"""A random block of layers a step. Next: `norm_cap.py`.

One idea: an estimator is told which parameters to look at, so looking at fewer of them needs nothing from it.
"""

from collections.abc import Collection
from typing import Any

from hybrid_opt.config.wrappers import LayerSubset
from hybrid_opt.engines.contract import Engine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.contract import Cost, Estimate, Estimator, Restricted
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Objective
from hybrid_opt.scheduling.policy import layer_number


class LayerSubsetEstimator:
    """Estimates the gradient of a block of k consecutive layers, each block equally likely, and is zero elsewhere.

    Layers lie on a circle, and everything without a layer's number is one of them, so each parameter is in k of the L blocks. The
    estimate is that of the block, not multiplied by L/k: over the steps it is block coordinate descent.
    """

    def __init__(self, inner: Estimator, config: LayerSubset) -> None:
        self.inner = inner
        self.config = config

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`."""
        layers = len({layer_number(name) for name in names})
        if self.config.layers > layers:
            raise UserError(
                f"wrappers: layer_subset: layers: {self.config.layers} are more than the {layers} that the estimator may move (all "
                f"without a number count as one); write {layers} or fewer"
            )
        self.inner.check(engine, names)

    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[Estimate, Cost]:
        """See `Estimator.estimate`."""
        chosen = self.prepare(engine, names, key)
        estimate, cost = self.inner.estimate(engine, objective, batch, chosen, key)
        return Restricted(estimate, frozenset(chosen)), cost

    def prepare(self, engine: Engine, names: Collection[str], key: StepKey) -> list[str]:
        """See `Prepares.prepare`: the parameters of the step's block."""
        layers = list(dict.fromkeys(layer_number(name) for name in engine.parameters if name in names))
        first = key.fold("layer_subset").seed() % len(layers)
        block = (layers + layers)[first : first + self.config.layers]
        return [name for name in engine.parameters if name in names and layer_number(name) in block]
