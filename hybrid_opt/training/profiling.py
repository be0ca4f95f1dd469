"""Which layers matter, measured on the batch of a step. Next: `../scheduling/ownership.py`, `../config/importance.py`.

One idea: a layer matters as much as its gradient is long. Backprop tells the norms of all layers at once; where its memory or a gradient is
missing, each layer's is estimated from losses at perturbed weights, as any estimator without a gradient would.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.importance import Importance
from hybrid_opt.config.perturbations import LowRankPerturbation
from hybrid_opt.config.probing import Spsa
from hybrid_opt.engines.contract import Engine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.backprop import BackpropEstimator
from hybrid_opt.estimators.contract import Cost, Gradient
from hybrid_opt.estimators.probing import added
from hybrid_opt.estimators.spsa import SpsaEstimator
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Objective
from hybrid_opt.scheduling.ownership import Ownership

NOTHING = Cost(loss=None, forwards=0, backwards=0, forward_equivalents=0.0)


@dataclass(frozen=True)
class Profile:
    """What a measurement before a step has shown and decided."""

    importance: Mapping[str, Mapping[int, float | None]]
    """Value of each layer, by the place of the rule; None: not finite, which counts as the highest."""
    decision: str
    """Which layers were chosen."""
    cost: Cost
    """What it took beside the step's estimates."""
    seconds: float


class Profiler:
    """Measures the layers that rules are to choose from, when it is time.

    Args:
        backprop: the schedule's backprop estimator, whose options for saving memory hold here too; None: it has none.

    Raises:
        UserError: a rule goes by gradient norms, and DeepSpeed has gradients in its own steps alone.
    """

    def __init__(self, engine: Engine, ownership: Ownership, backprop: Backprop | None, seed: int) -> None:
        self.engine, self.ownership, self.seed = engine, ownership, seed
        self.gradients = BackpropEstimator(backprop or Backprop(type="backprop", learning_rate=1.0))
        for places in ownership.rules.values():
            for place, rule in places.items():
                if rule.importance.by == "gradient_norm" and engine.layout()["zero_stage"]:
                    raise UserError(
                        f"{place}.layers.by: gradient_norm needs gradients outside of a step, which DeepSpeed does not give; write by: sensitivity, "
                        "or engine: {type: local}"
                    )

    def profile(self, phase: int | None, step: int, evaluated: Callable[[], tuple[Objective, Any]]) -> Profile | None:
        """Measure what is due before a step, and choose the layers; None: nothing is.

        Args:
            evaluated: gives what is minimised, and a batch on the engine's device.

        Raises:
            UserError: the objective has no gradient where norms of gradients are asked for.
        """
        due = self.ownership.due(phase, step)
        if not due:
            return None
        began, (objective, batch) = time.perf_counter(), evaluated()
        found, decisions, cost = {}, [], NOTHING
        for place, rule in due.items():
            measure = self._gradient_norms if rule.importance.by == "gradient_norm" else self._sensitivities
            values, own = measure(rule.importance, rule.layers, objective, batch, StepKey(self.seed, step, place))
            cost = added(cost, own)
            layers = self.ownership.choose(place, values, step)
            decisions.append(f"{place}: layers {', '.join(map(str, layers))} are {rule.importance}")
            found[place] = {layer: value if math.isfinite(value) else None for layer, value in values.items()}
        return Profile(found, "; ".join(decisions), cost, time.perf_counter() - began)

    def _gradient_norms(
        self,
        importance: Importance,
        layers: Mapping[int, list[str]],
        objective: Objective,
        batch: Any,
        key: StepKey,
    ) -> tuple[dict[int, float], Cost]:
        """`|dL/dw_l|` of each layer l."""
        if not objective.differentiable:
            raise UserError(
                f"{key.origin[2]}.layers.by: gradient_norm needs an objective with a gradient, and what is minimised in step {key.origin[1]} has "
                "none; write by: sensitivity, or let backprop act first"
            )
        names = [name for own in layers.values() for name in own]
        gradient, cost = self.gradients.estimate(self.engine, objective, batch, names, key)
        return {layer: self._norm(gradient, own) for layer, own in layers.items()}, cost

    def _norm(self, gradient: Gradient, names: list[str]) -> float:
        norm = math.sqrt(
            sum(gradient.read(shard).double().square().sum().item() for shard in self.engine.shards(names))
        )
        return norm if math.isfinite(norm) else math.inf

    def _sensitivities(
        self,
        importance: Importance,
        layers: Mapping[int, list[str]],
        objective: Objective,
        batch: Any,
        key: StepKey,
    ) -> tuple[dict[int, float], Cost]:
        """`sqrt(mean_j ((L(w + sigma z_j) - L(w - sigma z_j)) / (2 sigma))^2)` of each layer, whose square has the mean `|dL/dw_l|^2` as
        sigma goes to 0."""
        estimator = SpsaEstimator(
            Spsa(
                type="spsa",
                pairs=importance.probes,
                sigma=importance.sigma,
                learning_rate=1.0,
                perturbation=LowRankPerturbation(type="low_rank", otherwise="dense"),
            )
        )
        estimator.check(self.engine, [name for own in layers.values() for name in own])
        values, total = {}, NOTHING
        for layer, names in layers.items():
            _, cost = estimator.estimate(self.engine, objective, batch, names, key)
            values[layer] = math.inf if cost.nonfinite_members else cost.statistics["gradient_norm"]
            total = added(total, cost)
        return values, total
