"""Perturbations and steps of a share of the values alone. Next: `../../perturbations/masks.py`, `../../perturbations/masked_directions.py`, then `control_variate.py`.

One idea: a mask is decided once for many steps and kept, so evaluations and updates use the same one though weights move in between.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.config.wrappers import SparseMask
from hybrid_opt.engines.contract import Engine
from hybrid_opt.estimators.contract import Cost, Estimate, Estimator, Gradient, innermost
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Objective
from hybrid_opt.perturbations import masks
from hybrid_opt.perturbations.masked_directions import Masked, around_innermost


class SparseMaskEstimator:
    """The inner estimate along directions M z, M the mask of the first step that needs it in a stretch of `refresh` steps.

    A `Remembers`, and with `by: sensitivity` a `FollowsBackprop`: each gradient decides the masks that come next. Every rank keeps whole
    masks, because dense noise is evaluated on whole parameters.
    """

    def __init__(self, inner: Estimator, config: SparseMask) -> None:
        self.inner = inner
        self.config = config
        self.masks: dict[str, Tensor] = {}
        """Packed masks by parameter, on the engine's device."""
        self.stretches: dict[str, int] = {}
        """In which stretch of steps they were decided."""
        self.coming: dict[str, Tensor] = {}
        """What the latest gradient says."""
        perturbation = innermost(inner).perturbation
        perturbation.directions = around_innermost(perturbation.directions, lambda source: Masked(source, self.masks))

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`."""
        self.inner.check(engine, names)

    @torch.no_grad()
    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[Estimate, Cost]:
        """See `Estimator.estimate`."""
        self.prepare(engine, names, key)
        return self.inner.estimate(engine, objective, batch, names, key)

    @torch.no_grad()
    def prepare(self, engine: Engine, names: Collection[str], key: StepKey) -> Collection[str]:
        """See `Prepares.prepare`: the masks, where a new stretch of steps begins."""
        stretch = key.stretch(self.config.refresh)
        due = [name for name in engine.parameters if name in names and self.stretches.get(name) != stretch]
        if due:
            self.masks |= self._decided(engine, due, key)
            self.stretches |= dict.fromkeys(due, stretch)
        return names

    @torch.no_grad()
    def follow(self, engine: Engine, gradient: Gradient, names: Collection[str]) -> None:
        """See `FollowsBackprop.follow`."""
        if self.config.needs_gradient:
            in_order = [name for name in engine.parameters if name in names]
            self.coming |= masks.largest(engine, in_order, lambda shard: gradient.read(shard).abs(), self.config.keep)

    def state_dict(self) -> dict[str, Any]:
        """Masks, the stretches that they are of, and the masks that come next; the same on all ranks."""
        return {"masks": dict(self.masks), "stretches": dict(self.stretches), "coming": dict(self.coming)}

    def load_state_dict(self, state: dict[str, Any], engine: Engine) -> None:
        """See `Remembers.load_state_dict`."""
        for mine, kept in ((self.masks, state["masks"]), (self.coming, state["coming"])):
            mine.clear()
            mine.update({name: mask.to(engine.device) for name, mask in kept.items()})
        self.stretches = dict(state["stretches"])

    def _decided(self, engine: Engine, names: Collection[str], key: StepKey) -> dict[str, Tensor]:
        """New masks; all ranks together."""
        keep = self.config.keep
        if self.config.by == "small_magnitude":
            return masks.smallest(engine, names, lambda shard: shard.data.float().abs(), keep)
        known = {name: self.coming[name].clone() for name in names if name in self.coming}  # saved apart
        others = [name for name in names if name not in known]
        return known | masks.random(engine, others, key.lasting(self.config.refresh, "sparse_mask"), keep)
