"""Perturbations in proportion to the weights. Next: `sparse_mask.py`.

One idea: what is small and what is large differs from parameter to parameter, so sigma is measured in each one's own size, and the
perturbation takes the same factor out of the estimate that it has put into the evaluation.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from hybrid_opt.config.wrappers import RelativeSigma
from hybrid_opt.engines.contract import Engine, whole_shape
from hybrid_opt.engines.inner_products import blocks
from hybrid_opt.estimators.contract import Cost, Estimate, Estimator, innermost
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Objective


class RelativeSigmaEstimator:
    """Evaluates `w + sigma s z` with `s = max(rms(w), floor)` for each parameter, and adds up `z / s`: for a loss that is linear in the
    weights the mean of the estimate is the gradient, whatever s. A `Remembers`: s is of the first step that needs it in a stretch of
    `refresh` steps."""

    def __init__(self, inner: Estimator, config: RelativeSigma) -> None:
        self.inner = inner
        self.config = config
        self.scales: dict[str, tuple[int, float]] = {}
        """For each parameter the number of the stretch, and s."""

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`."""
        self.inner.check(engine, names)

    @torch.no_grad()
    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[Estimate, Cost]:
        """See `Estimator.estimate`."""
        self.prepare(engine, names, key)
        estimate, cost = self.inner.estimate(engine, objective, batch, names, key)
        told = {what: value for what, value in cost.statistics.items() if what != "gradient_norm"}  # of s g it would be
        return estimate, replace(cost, statistics=told)

    @torch.no_grad()
    def prepare(self, engine: Engine, names: Collection[str], key: StepKey) -> Collection[str]:
        """See `Prepares.prepare`: the scales, where a new stretch of steps begins."""
        stretch = key.stretch(self.config.refresh)
        due = [n for n in engine.parameters if n in names and (n not in self.scales or self.scales[n][0] != stretch)]
        sizes = root_mean_squares(engine, due)
        self.scales |= {name: (stretch, max(size, self.config.floor)) for name, size in sizes.items()}
        innermost(self.inner).perturbation.scales = {name: self.scales[name][1] for name in names}
        return names

    def state_dict(self) -> dict[str, tuple[int, float]]:
        """The stretch and s by parameter; the same on all ranks."""
        return dict(self.scales)

    def load_state_dict(self, state: dict[str, Any], engine: Engine) -> None:
        """See `Remembers.load_state_dict`."""
        self.scales = {name: tuple(kept) for name, kept in state.items()}


def root_mean_squares(engine: Engine, names: Collection[str]) -> dict[str, float]:
    """Root of the mean square of each parameter's float32 values; all ranks together.

    Squares are added in float64 and roots rounded to float32, so that how ranks share the weights shows in no more than the last bit.
    """
    place = {name: i for i, name in enumerate(names)}
    sums = torch.zeros(len(place), dtype=torch.float64, device=engine.device)
    for block in blocks(engine, place):
        sums[place[block.name]] += block.data.double().square().sum() / block.copies
    counts = torch.tensor([whole_shape(engine.parameters[name]).numel() for name in place], dtype=torch.float64)
    sizes = (engine.ranks.gather(sums.cpu()).sum(dim=0) / counts).sqrt().float()
    return dict(zip(place, sizes.tolist(), strict=True))
