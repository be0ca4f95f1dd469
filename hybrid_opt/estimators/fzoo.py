"""Slopes in units of their own spread (FZOO). Next: `guided/storage.py`, then `forward_gradient.py`, `backprop.py`.

One idea: the standard deviation of the losses around a point says how steep it is there, so dividing by it makes steps of one length at no
further cost, as normalised gradient descent does.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.config.fzoo import Fzoo
from hybrid_opt.engines.contract import Engine
from hybrid_opt.estimators.contract import Cost
from hybrid_opt.estimators.probing import NoiseSum, Probe, nothing
from hybrid_opt.noise.keys import Key, StepKey
from hybrid_opt.objectives.contract import Objective
from hybrid_opt.perturbations.build import build_perturbation
from hybrid_opt.perturbations.contract import Member


@dataclass(frozen=True)
class Rises:
    """How much the loss rises along some directions."""

    names: frozenset[str] = frozenset()
    """Parameters that were perturbed."""
    keys: Sequence[Key] = ()
    values: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """`L_i - L_0`, (keys,) float64, both losses of one step and its examples."""


class FzooEstimator:
    """`g = 1/(N s) sum_i (L(w + sigma u_i) - L(w)) u_i`, s the standard deviation of the N rises L_i - L_0 with the divisor N - 1 (FZOO,
    arXiv 2506.09034; its released code divides by N).

    For a linear loss `E s^2 = sigma^2 |grad|^2`, so g is about a gradient of length 1 in its direction, and all of it has the length
    sqrt((n + N - 1)/N). With `reuse` half of the rises are those of the directions that the step before drew. They are rises above that
    step's own L_0: losses on different examples differ by more than directions do. A direction along which the loss is not finite counts
    for nothing, neither in the sum, which is still divided by N, nor in s, and is not reused. A `Remembers`.
    """

    def __init__(self, config: Fzoo) -> None:
        self.config = config
        self.perturbation = build_perturbation(config)
        self.latest = Rises()

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`."""
        self.perturbation.check(engine, names)

    @torch.no_grad()
    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[NoiseSum, Cost]:
        """See `Estimator.estimate`. `loss` is that at the weights as they are, `loss_spread` is s, and `gradient_norm` is s / sigma.

        Raises:
            UserError: see `Probe`.
        """
        moved = frozenset(names)
        before = self.latest if self.config.reuse and self.latest.names == moved else Rises()
        new = [key.fold(i) for i in range(self.config.population_size - len(before.keys))]
        keys = [*before.keys, *new]
        perturbation = self.perturbation.ready(engine, names, keys, key)
        members = [*(Member(k, 1) for k in new), Member(new[-1], 0)]
        probed = Probe(self.config, engine, objective, batch, names, key)(perturbation, members)
        losses, known = probed.means.double(), probed.known[:-1]
        if probed.cost.is_empty:
            self.latest = Rises()
            return nothing(perturbation, keys), replace(probed.cost, loss=losses[-1].item())
        found = losses[:-1] - losses[-1]
        if self.config.reuse:
            kept = [i for i in range(len(new) - self.config.population_size // 2, len(new)) if known[i]]
            self.latest = Rises(moved, [new[i] for i in kept], found[kept])
        rises = torch.cat([before.values, found.masked_fill(~known, torch.nan)])
        return self._made_of(rises, NoiseSum(perturbation, keys, rises), probed.cost, losses[-1].item(), objective)

    def _made_of(
        self, rises: Tensor, noise: NoiseSum, cost: Cost, clean: float, objective: Objective
    ) -> tuple[NoiseSum, Cost]:
        """The estimate and its cost.

        Args:
            rises: of each direction, NaN where it is not known.
        """
        known = rises[~rises.isnan()]
        is_flat = bool((known == known[0]).all())
        spread = 0.0 if is_flat else known.std().item()
        coefficients = torch.zeros_like(rises) if is_flat else rises.nan_to_num(0.0) / (len(rises) * spread)
        statistics = {**cost.statistics, "gradient_norm": spread / self.config.sigma}
        if is_flat or not objective.differentiable:
            statistics["skipped"] = int(is_flat)
        cost = replace(cost, loss=clean, loss_spread=spread, statistics=statistics, is_empty=is_flat)
        return replace(noise, coefficients=coefficients), cost

    def state_dict(self) -> dict[str, Any]:
        """The directions that the next step reuses and their rises; the same on all ranks."""
        latest = self.latest
        return {"names": sorted(latest.names), "keys": [key.text for key in latest.keys], "values": latest.values}

    def load_state_dict(self, state: dict[str, Any], engine: Engine) -> None:
        """See `Remembers.load_state_dict`."""
        keys = [Key.from_text(text) for text in state["keys"]]
        self.latest = Rises(frozenset(state["names"]), keys, state["values"].cpu())
