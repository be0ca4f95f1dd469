"""Momentum whose earlier estimates are made again from their keys. Next: `../replay.py`.

One idea: an estimate is a few keys and coefficients, so a sum of many of them needs no buffer; its noise is drawn again at each step.
"""

from collections import deque
from collections.abc import Collection
from typing import Any

from hybrid_opt.config.wrappers import ReplayedMomentum
from hybrid_opt.engines.contract import Engine
from hybrid_opt.estimators.contract import Cost, Estimate, Estimator, WeightedSum, chain
from hybrid_opt.estimators.replay import Replay, replays_of, replays_state, restored_replays
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Objective


class MomentumEstimator:
    """`m_t = sum_{i < window} beta^i g_{t-i}`, g the inner estimates; with all steps in the window, `m_t = beta m_{t-1} + g_t`.

    Steps are those in which the estimator acts and whose estimate is not empty. A `Remembers`.
    """

    def __init__(self, inner: Estimator, config: ReplayedMomentum) -> None:
        self.inner = inner
        self.config = config
        self.latest: deque[list[Replay]] = deque(maxlen=config.window)

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`."""
        self.inner.check(engine, names)

    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[Estimate, Cost]:
        """See `Estimator.estimate`."""
        estimate, cost = self.inner.estimate(engine, objective, batch, names, key)
        if cost.is_empty:
            return estimate, cost
        self.latest.appendleft(replays_of(estimate, frozenset(names), key))
        terms = [(self.config.beta**age, replay) for age, step in enumerate(self.latest) for replay in step]
        return WeightedSum(terms), cost

    def state_dict(self) -> dict[str, Any]:
        """The keys, coefficients and parameters of the estimates in the window, the latest first; the same on all ranks."""
        return {"latest": replays_state(self.latest)}

    def load_state_dict(self, state: dict[str, Any], engine: Engine) -> None:
        """See `Remembers.load_state_dict`."""
        *_, innermost = chain(self.inner)
        self.latest.clear()
        self.latest.extend(restored_replays(state["latest"], innermost.perturbation, engine))
