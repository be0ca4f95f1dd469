"""The hybrid estimator: forward passes that look first where backprop has looked. Next: `../wrappers/build.py`.

One idea: a gradient that backprop took some steps ago still has much of today's gradient in it, and one pair of forward passes tells
how much; the others look for what it misses.
"""

from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.config.guided import Guided, MixedCovariance
from hybrid_opt.engines.contract import Engine, Shard, whole_shape
from hybrid_opt.estimators.contract import Cost, Estimate, Gradient
from hybrid_opt.estimators.guided.designs import ExactDesign, MixedDesign, standard_normal
from hybrid_opt.estimators.guided.directions import GuidedDirections
from hybrid_opt.estimators.guided.span import Span, span
from hybrid_opt.estimators.guided.storage import Guide, restored_guide, stored_guide
from hybrid_opt.estimators.probing import NoiseSum, Probe, nothing, pairs_of
from hybrid_opt.noise.keys import Key, StepKey
from hybrid_opt.objectives.contract import Objective
from hybrid_opt.perturbations.build import build_perturbation
from hybrid_opt.perturbations.dense import DensePerturbation

MEMORY = 0.5
"""Weight of the energies that steps before have found, against 1 for those of this step."""


class GuidedEstimator:
    """Slopes along guides and random directions; `ExactDesign` and `MixedDesign` have the equations.

    Which guides are good is told by rho^2, the share of |gradient|^2 in their span. The estimate of it is `I / (I + O)`, with I and O
    sums over the steps since these guides came of the energies found inside and outside their span, half as much for each step
    back. I and O have no bias; their quotient has a small one, towards more, because O varies: of order 2 / (P - k) of
    itself. Where `rho^2 < (P + k + 1) / (P + n + 1)`, random directions are worth more (P pairs, k guides, n weights),
    and the guides rest until others come; own estimates do not, because the next step has others anyway.

    A step without guides is plain ES, shrunk by `c = P / (P + n + 1)` as the exact form with k = 0 is: for a linear loss the mean
    square error is `(1 - c) |gradient|^2`, and the same learning rate suits both kinds of steps. A slope that is not known, because a loss
    is not finite, counts as 0, and the guides are not judged in such a step. A `FollowsBackprop`; it `Remembers`.
    """

    def __init__(self, config: Guided) -> None:
        self.config = config
        self.perturbation = build_perturbation(config)
        self.guides: tuple[Guide, ...] = ()
        self.energies = (0.0, 0.0)
        self.are_dropped = False
        self.due: frozenset[str] = frozenset()

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`: dense directions reach every parameter."""

    @torch.no_grad()
    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[NoiseSum, Cost]:
        """See `Estimator.estimate`.

        Adds the statistics `guide_rho2`, the estimate of rho^2 (of a step with guides), `fell_back`, whether the step had none, and
        `gradient_norm`, for a linear loss that of the gradient, its square without bias.

        Raises:
            UserError: see `Probe`.
        """
        self._look_up_moment(engine)
        keys = [key.fold(j) for j in range(self.config.pairs)]
        guides = () if self.are_dropped else self.guides
        found = span(engine, names, guides, keys)
        values = sum(whole_shape(engine.parameters[name]).numel() for name in names)
        design = self._design(found, values, keys)
        perturbation = self._perturbation(guides, found, design, keys)
        probed = Probe(self.config, engine, objective, batch, names, key)(perturbation, pairs_of(keys), together=2)
        if probed.cost.is_empty:
            return nothing(perturbation, keys), probed.cost
        slopes = probed.slopes(self.config.sigma)
        estimate = NoiseSum(perturbation, keys, design.coefficients(slopes))
        told = self._judge(design, slopes) if probed.known.all() else {"fell_back": int(not guides)}
        if self.config.guides.type == "estimates":
            self._keep(engine, names, lambda name: _whole(engine, estimate, name))
        return estimate, replace(probed.cost, statistics={**probed.cost.statistics, **told})

    @torch.no_grad()
    def follow(self, engine: Engine, gradient: Gradient, names: Collection[str]) -> None:
        """See `FollowsBackprop.follow`. The optimizer's moment is looked up when it is needed, after the optimizer's step."""
        if self.config.guides.type == "gradients":
            self._keep(engine, names, gradient.whole)
        elif self.config.guides.type == "first_moment":
            self.due = frozenset(names)

    def state_dict(self) -> dict[str, Any]:
        """The guides, which are the same on every rank, and what is known of them."""
        guides = [{name: part.tensors() for name, part in guide.by_name.items()} for guide in self.guides]
        return {
            "guides": {str(number): guide for number, guide in enumerate(guides)},
            "energies": list(self.energies),
            "are_dropped": self.are_dropped,
            "due": sorted(self.due),
        }

    def load_state_dict(self, state: dict[str, Any], engine: Engine) -> None:
        """See `Remembers.load_state_dict`."""
        guides = [state["guides"][str(number)] for number in range(len(state["guides"]))]
        self.guides = tuple(restored_guide(engine, guide, self.config.storage) for guide in guides)
        self.energies, self.are_dropped = tuple(state["energies"]), state["are_dropped"]
        self.due = frozenset(state["due"])

    def _keep(self, engine: Engine, names: Collection[str], values_of: Callable[[str], Tensor | None]) -> None:
        """A new guide takes the place of the oldest. An estimate that is still to be read has a tuple of its own."""
        self.guides = self.guides[: self.config.guides.count - 1]
        in_order = [name for name in engine.parameters if name in names]  # the same on every rank
        guide = stored_guide(engine, in_order, values_of, self.config.storage)
        self.guides = (guide, *self.guides)
        self.energies, self.are_dropped = (0.0, 0.0), False

    def _look_up_moment(self, engine: Engine) -> None:
        if self.due:
            self._keep(engine, self.due, engine.first_moment)
            self.due = frozenset()

    def _design(self, found: Span, values: int, keys: Sequence[Key]) -> ExactDesign | MixedDesign:
        form, guides = self.config.form, found.noise.shape[1]
        if not isinstance(form, MixedCovariance):
            return ExactDesign(found.noise, values, form.reach / self.config.sigma)
        if not guides:
            return ExactDesign(found.noise, values, 1.0, scale=form.beta)
        return MixedDesign(found.noise, values, standard_normal(keys, guides), form.alpha, form.beta)

    def _perturbation(
        self, guides: Sequence[Guide], found: Span, design: ExactDesign | MixedDesign, keys: Sequence[Key]
    ) -> DensePerturbation:
        factors = design.along @ found.basis.T  # of the guides as they are stored, (P, guides)
        mixture = dict(zip(keys, zip(design.noise.tolist(), factors.tolist(), strict=True), strict=True))
        result = copy(self.perturbation)
        result.directions = GuidedDirections(guides, mixture)
        return result

    def _judge(self, design: ExactDesign | MixedDesign, slopes: Tensor) -> dict[str, float]:
        """What this step says of the guides; drops them if random directions are worth more."""
        pairs, guides = design.noise_in_span.shape
        if not guides:
            return {"gradient_norm": slopes.square().mean().sqrt().item(), "fell_back": 1}
        found = design.energies(slopes)
        self.energies = tuple(MEMORY * old + new for old, new in zip(self.energies, found, strict=True))
        inside, outside = (max(0.0, energy) for energy in self.energies)
        rho2 = inside / (inside + outside) if inside + outside else 0.0
        self.are_dropped = rho2 < (pairs + guides + 1) / (pairs + design.values + 1)
        norm = max(0.0, sum(found)) ** 0.5
        return {"gradient_norm": norm, "guide_rho2": rho2, "fell_back": 0}


def _whole(engine: Engine, estimate: Estimate, name: str) -> Tensor:
    """An estimate made of noise can be read anywhere."""
    p = engine.parameters[name]
    shape = whole_shape(p)
    return estimate.read(Shard(name, torch.empty(shape.numel(), device=p.device), 0, shape))
