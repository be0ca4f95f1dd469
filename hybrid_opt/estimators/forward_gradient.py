"""Exact slopes along random directions, by forward-mode differentiation. Next: `../perturbations/swapping.py`.

One idea: weights with a tangent take the place of a module's own while it runs, and the losses that come out carry their slope along
that tangent with them. Nothing is recorded for a backward pass, so tangents live as long as the values that they belong to.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from hybrid_opt.config.forward_gradient import ForwardGradient
from hybrid_opt.engines.contract import Engine, is_spread
from hybrid_opt.errors import DivergedError, UserError
from hybrid_opt.estimators.contract import Cost
from hybrid_opt.estimators.modes import training_mode
from hybrid_opt.estimators.probing import NoiseSum, nothing
from hybrid_opt.noise.keys import Key, StepKey
from hybrid_opt.objectives.contract import Objective, count_examples, count_tokens, select
from hybrid_opt.perturbations.dense import DensePerturbation
from hybrid_opt.perturbations.mixed_directions import directions_of
from hybrid_opt.perturbations.rehearsal import rehearse
from hybrid_opt.perturbations.swapping import owners_of, while_running

DUAL_FORWARD = 3.0
"""Forward passes that take as much computing as one that carries slopes: each product `x W` becomes `x W`, `x' W` and `x W'` (on a
processor a small Llama took 3.3)."""


class ForwardGradientEstimator:
    """`g = 1/k sum_j (dL . z_j) z_j` over k tangents z_j, each slope exact (Baydin et al., arXiv 2202.08587).

    Without bias. For n weights `MSE / |g|^2` is (n + 1)/k with Gaussian tangents, (n - 1)/k with Rademacher or sphere, n/k - 1 with
    orthogonal ones. Dropout is off. A
    weight is found as an attribute of its module; a tied one has one tangent for all its places. The row of an embedding's
    `padding_idx`, whose gradient torch's backward pass sets to zero, takes part with its true slope, as in ES. A slope that is not finite
    counts as 0.
    """

    def __init__(self, config: ForwardGradient) -> None:
        self.config = config
        self.perturbation = DensePerturbation(directions_of(config.distribution), sigma=1.0)
        self._outside: dict[tuple[nn.Module, frozenset[str]], frozenset[str]] = {}

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`.

        Raises:
            UserError: ZeRO-3 spreads a parameter over the ranks.
        """
        for name in names:
            if is_spread(engine.parameters[name]):
                raise UserError(
                    f"schedule: forward_gradient needs whole weights, and ZeRO-3 spreads parameter {name} over the ranks; write "
                    "zero_stage: 2, or use spsa"
                )

    @torch.no_grad()
    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[NoiseSum, Cost]:
        """See `Estimator.estimate`; ranks deal the tangents out and exchange the slopes.

        Raises:
            UserError: the objective has no gradient, or an operator of the model has no forward-mode derivative.
            DivergedError: the loss is not finite.
        """
        if not objective.differentiable:
            raise UserError("objective: it has no gradient, which forward_gradient needs; use spsa or es")
        keys = [key.fold(j) for j in range(self.config.tangents)]
        perturbation = self.perturbation.ready(engine, names, keys, key)
        parameters = {name: p for name, p in engine.parameters.items() if name in names}
        outside = self._used_outside(engine, objective, batch, parameters)
        dealt = engine.ranks.deal(len(keys))
        with training_mode(engine.model, False):
            mine = [
                self._loss_and_slope(
                    engine, objective, batch, parameters, outside, _duals(parameters, perturbation, keys[j])
                )
                for j in dealt[engine.ranks.rank]
            ]
        found = torch.empty(len(keys), 2, dtype=torch.float64)
        found[torch.tensor(dealt)] = engine.ranks.gather(torch.tensor(mine, dtype=torch.float64))
        losses, slopes = found.unbind(1)
        if not losses.isfinite().all():
            raise DivergedError("the loss at the weights as they are is not finite; lower the learning rates")
        known = slopes.isfinite()
        lost = {} if known.all() else {"nonfinite_members": int((~known).sum())}
        cost = Cost(
            loss=losses.mean().item(),
            forwards=len(keys),
            backwards=0,
            forward_equivalents=DUAL_FORWARD * len(keys),
            tokens=len(keys) * count_tokens(batch),
            statistics=lost,
        )
        if (~known).sum() > self.config.max_nonfinite * len(keys):
            return nothing(perturbation, keys), replace(cost, statistics={**lost, "skipped": 1}, is_empty=True)
        statistics = {**lost, "gradient_norm": slopes[known].square().mean().sqrt().item()}
        estimate = NoiseSum(perturbation, keys, slopes.masked_fill(~known, 0.0) / len(keys))
        return estimate, replace(cost, statistics=statistics)

    def _loss_and_slope(
        self,
        engine: Engine,
        objective: Objective,
        batch: Any,
        parameters: Mapping[str, nn.Parameter],
        outside: Collection[str],
        weights_of: Callable[[str], Tensor],
    ) -> tuple[float, float]:
        """The mean loss of the batch and its slope along one tangent, part by part."""
        loss = slope = 0.0
        count = 0
        for part in self._parts(batch):
            with forward_ad.dual_level(), _carrying(engine.model, parameters, outside, weights_of):
                primal, tangent = forward_ad.unpack_dual(_differentiated(objective, engine.model, part))
                if tangent is None:
                    raise UserError(
                        "objective: the losses do not depend on the parameters through torch operations, so they have no slope; "
                        "compute them without detach, or use spsa"
                    )
                loss += primal.double().sum().item()
                slope += tangent.double().sum().item()
                count += len(primal)
        return loss / count, slope / count

    def _parts(self, batch: Any) -> Iterator[Any]:
        examples, size = count_examples(batch), self.config.micro_batch_size
        if examples is None or size is None or size >= examples:
            yield batch
            return
        for numbers in torch.arange(examples).split(size):
            yield select(batch, numbers)

    def _used_outside(
        self, engine: Engine, objective: Objective, batch: Any, parameters: Mapping[str, nn.Parameter]
    ) -> frozenset[str]:
        place = (engine.model, frozenset(parameters))
        if place not in self._outside:
            self._outside[place] = rehearse(engine, objective, batch, parameters).outside
        return self._outside[place]


def _duals(
    parameters: Mapping[str, nn.Parameter], perturbation: DensePerturbation, key: Key
) -> Callable[[str], Tensor]:
    """Weights by name, that carry their part of a direction as their tangent."""

    def weights_of(name: str) -> Tensor:
        weights = parameters[name].data
        tangent = perturbation.directions.read([key], name, 0, weights.numel(), weights.device)[0]
        return forward_ad.make_dual(weights, tangent.view(weights.shape).to(weights.dtype))

    return weights_of


def _differentiated(objective: Objective, model: nn.Module, part: Any) -> Tensor:
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
            return objective.losses(model, part).float()
    except NotImplementedError as error:
        if "forward AD" not in str(error):
            raise
        raise UserError(
            f"forward_gradient: an operator of the model has no forward-mode derivative ({str(error).splitlines()[0]}); use spsa or "
            "es, or another implementation of it, such as attn_implementation: eager"
        ) from error


@contextmanager
def _carrying(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    outside: Collection[str],
    weights_of: Callable[[str], Tensor],
) -> Iterator[None]:
    """Inside, modules compute with `weights_of(name)`; those used outside their module's forward are in place all the time."""
    lasting = {name: p for name, p in parameters.items() if name in outside}
    passing = {name: p for name, p in parameters.items() if name not in outside}
    owners = owners_of(model, lasting)
    own = {module: dict(module._parameters) for module in owners}
    made = {name: weights_of(name) for name in lasting}
    try:
        for module, attributes in owners.items():
            module._parameters.update({attribute: made[name] for attribute, name in attributes.items()})
        with while_running(model, passing, weights_of):
            yield
    finally:
        for module, weights in own.items():
            module._parameters.update(weights)
