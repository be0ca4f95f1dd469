"""Estimates corrected by what they would have been at anchor weights. Next: `momentum.py`.

One idea: the same directions and examples err alike at weights that lie near each other, so the difference of their estimates at two of
them is nearly free of that error, and what an anchor's own estimate should be is known from many steps.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.config.wrappers import ControlVariate
from hybrid_opt.engines.contract import Engine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.contract import Cost, Estimate, Estimator, WeightedSum, innermost
from hybrid_opt.estimators.probing import added
from hybrid_opt.estimators.replay import Replay, replays_of, replays_state, restored_replays
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Objective


class ControlVariateEstimator:
    """`g_t(w) - g_t(w_a) + G_a`, g_t the inner estimate with the batch and the key of step t, at the weights w and at the anchor w_a; G_a
    is the mean of g_s(w_a) over at most the `terms` latest steps s < t since the anchor was set.

    In the first step of an anchor w is w_a and there is no G_a: the estimate is g_t(w). G_a has not seen the batch and the directions of
    step t, so for batches and directions that are independent from step to step `E g_t(w_a) = E G_a` given w_a, and the mean of the
    estimate is that of g_t(w), whether the inner estimate is linear in the losses or not. For `spsa` along Rademacher directions, losses
    f_b of random batches that are quadratic, q pairs, K terms and a fixed difference `h_b = grad f_b(w) - grad f_b(w_a)`, over n weights

        E |estimate - E grad f_b(w)|^2 = V(h_b) + V(grad f_b(w_a)) / K,    V(u_b) = (1 + (n - 1)/q) E |u_b|^2 - |E u_b|^2

    where the plain estimate has `V(grad f_b(w))`. Sources: SVRG (Johnson & Zhang 2013), MeZO-SVRG (arXiv 2404.08080).

    Where a loss is not finite, the two estimates would differ in which directions count, so such a step has the plain estimate, and no
    part in G_a.

    An anchor is of the first step that needs it in a stretch of `refresh` steps, and a new one is set where other parameters are
    estimated (a phase with another policy). It has all weights that anybody moves, or G_a would mix estimates at different weights.
    A `Remembers`.
    """

    def __init__(self, inner: Estimator, config: ControlVariate) -> None:
        self.inner = inner
        self.config = config
        self.place: tuple[int, frozenset[str]] | None = None
        """For which stretch of steps and which parameters the anchor was set."""
        self.anchor: dict[str, Tensor] = {}
        """w_a by parameter, as the model computes with it, in main memory."""
        self.earlier: deque[list[Replay]] = deque(maxlen=config.terms)
        """The terms of G_a, the latest first."""

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`.

        Raises:
            UserError: DeepSpeed holds the weights.
        """
        if stage := engine.layout()["zero_stage"]:
            raise UserError(
                f"wrappers: control_variate writes anchor weights into the model, and zero_stage: {stage} has DeepSpeed hold it; write "
                "engine: {type: local}, or take control_variate off"
            )
        self.inner.check(engine, names)

    @torch.no_grad()
    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[Estimate, Cost]:
        """See `Estimator.estimate`; loss and statistics are those at w."""
        moved = frozenset(names)
        is_anchor = self._set_anchor(engine, moved, key)
        estimate, cost = self.inner.estimate(engine, objective, batch, names, key)
        if cost.nonfinite_members:
            return estimate, cost
        here = replays_of(estimate, moved, key)
        if is_anchor:
            self.earlier.append(here)
            return estimate, cost
        with computing_with(engine, self.anchor):
            at_anchor, anchor_cost = self.inner.estimate(engine, objective, batch, names, key)
        if anchor_cost.nonfinite_members:
            return estimate, added(anchor_cost, cost)
        there = replays_of(at_anchor, moved, key)
        share = 1 / len(self.earlier)
        mean = [(share, replay) for step in self.earlier for replay in step]
        self.earlier.appendleft(there)
        return WeightedSum([*_differences(here, there), *mean]), _of_both(anchor_cost, cost)

    def state_dict(self) -> dict[str, Any]:
        """The anchor, when it was set, and the keys and coefficients of G_a."""
        stretch, moved = self.place or (None, frozenset())
        return {
            "stretch": stretch,
            "names": sorted(moved),
            "anchor": dict(self.anchor),
            "earlier": replays_state(self.earlier),
        }

    def load_state_dict(self, state: dict[str, Any], engine: Engine) -> None:
        """See `Remembers.load_state_dict`."""
        self.place = None if state["stretch"] is None else (state["stretch"], frozenset(state["names"]))
        self.anchor = dict(state["anchor"])
        self.earlier.clear()
        self.earlier.extend(restored_replays(state["earlier"], innermost(self.inner).perturbation, engine))

    def _set_anchor(self, engine: Engine, moved: frozenset[str], key: StepKey) -> bool:
        """Let the weights be the anchor if it is time for a new one, and say whether it is."""
        place = (key.stretch(self.config.refresh), moved)
        if place == self.place and self.earlier:  # a step that failed has left none
            return False
        self.anchor = {}  # before there is another
        movable = [shard.name for shard in engine.shards(engine.parameters)]
        self.anchor = {name: engine.parameters[name].detach().to("cpu", copy=True) for name in movable}
        self.place = place
        self.earlier.clear()
        return True


@contextmanager
def computing_with(engine: Engine, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the model has these weights, by parameter; its own are copied before and put back at the end whatever happens."""
    own = {name: engine.parameters[name].data.clone() for name in weights}
    try:
        for name, values in weights.items():
            engine.parameters[name].data.copy_(values)
        yield
    finally:
        for name, values in own.items():
            engine.parameters[name].data.copy_(values)


def _differences(here: Sequence[Replay], there: Sequence[Replay]) -> Iterator[tuple[float, Estimate]]:
    """`g_t(w) - g_t(w_a)`, whose directions are the same, so that they are drawn once and coefficients are subtracted in float64."""
    for at_weights, at_anchor in zip(here, there, strict=True):
        noise = at_weights.noise
        assert noise.keys == at_anchor.noise.keys, "one key gives the same directions at any weights"
        coefficients = noise.coefficients.double() - at_anchor.noise.coefficients.double()
        yield 1.0, replace(at_weights, noise=replace(noise, coefficients=coefficients))


def _of_both(anchor: Cost, own: Cost) -> Cost:
    """The cost of both evaluations; members that are equally good say nothing, but the other terms do, so the step is not skipped."""
    statistics = {**own.statistics, "skipped": 0} if own.is_empty else own.statistics
    return replace(added(anchor, own), statistics=statistics, is_empty=False)
