"""Evolution strategies: a gradient estimate from losses at perturbed weights. Next: `fitness.py`, then `backprop.py`.

One idea: the estimate is `sum_i c_i * noise(key_i)`, so it is kept as N coefficients and N keys, and any process can
regenerate any slice of it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid_opt.config.estimators import DensePerturbation as DenseConfig
from hybrid_opt.config.estimators import EvolutionStrategy
from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.engines.ranks import Ranks
from hybrid_opt.errors import DivergedError, UserError
from hybrid_opt.estimators.contract import Cost, zeros_and
from hybrid_opt.estimators.dense import DensePerturbation
from hybrid_opt.estimators.fitness import Fitness, fitness, odd_and_even, worst_for_missing
from hybrid_opt.estimators.forward_size import ForwardSize
from hybrid_opt.estimators.low_rank import LowRankPerturbation
from hybrid_opt.estimators.modes import training_mode
from hybrid_opt.estimators.noise import Key
from hybrid_opt.estimators.perturbation import Member, Perturbation
from hybrid_opt.estimators.population import PopulationWatch
from hybrid_opt.estimators.shaping import FITNESS_SHAPING
from hybrid_opt.objectives.contract import Generates, Objective, Tally, count_examples, count_tokens, select


@dataclass(frozen=True)
class NoiseSum:
    """`sum_i c_i * noise(key_i)`, regenerated when read."""

    perturbation: Perturbation
    keys: Sequence[Key]
    coefficients: Tensor
    """(keys,) float64."""

    def read(self, shard: Shard) -> Tensor:
        """The sum's slice for a shard: float32 (numel,)."""
        return zeros_and(self, shard)

    def add_to(self, out: Tensor, shard: Shard, factor: float) -> None:
        """See `Estimate.add_to`."""
        self.perturbation.add_noise(self.keys, factor * self.coefficients, shard, out)


class EsEstimator:
    """Evolution strategies with a population of N members.

    `g = 1/(N sigma) sum_i w_i s_i eps_i`, with w the shaped losses of the members and s their signs. With antithetic pairs
    and no shaping this is n-SPSA, `1/(2 q sigma) sum_j (L+_j - L-_j) eps_j` with q = N/2 pairs. With
    `divide_by_sigma=False` the factor is 1/N (EA4LLM, arXiv 2510.10603; ES at Scale, arXiv 2509.24372).
    """

    def __init__(self, config: EvolutionStrategy):
        self.config = config
        self.perturbation: Perturbation = _build_perturbation(config)
        self.watch = PopulationWatch()

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`."""
        self.perturbation.check(engine, names)

    @torch.no_grad()
    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: Key
    ) -> tuple[NoiseSum, Cost]:
        """See `Estimator.estimate`.

        Raises:
            UserError: a member's loss is not finite (a missing reward is not meant: it counts as the worst of the step).
        """
        members = self._members(key)
        examples = self._examples(batch, key, len(members))
        generates = isinstance(objective, Generates)
        batch = objective.seeded(batch, key) if generates else batch
        with training_mode(engine.model, False):
            losses = self._evaluate(engine, objective, batch, names, members, examples)
        losses = worst_for_missing(losses) if generates else losses
        means = losses.mean(dim=1)
        self._check(means)
        found = fitness(losses, examples, self.config.group_baseline)
        weights = FITNESS_SHAPING[self.config.fitness_shaping](found.values)
        estimate = NoiseSum(self.perturbation, [m.key for m in members], self._coefficients(members, weights))
        seen, written = observed(objective.tally, engine.ranks) if generates else ({}, 0)
        cost = Cost(
            loss=means.mean().item(),
            forwards=len(members),
            backwards=0,
            forward_equivalents=len(members) if examples is None else examples.numel() / count_examples(batch),
            tokens=_tokens(batch, examples, len(members)) + written,
            loss_spread=means.std(correction=0).item(),
            statistics=self._statistics(found, objective, means) | seen,
            is_empty=found.is_flat,
        )
        return _merge_pairs(estimate) if self.config.antithetic else estimate, cost

    def _statistics(self, found: Fitness, objective: Objective, losses: Tensor) -> dict[str, float]:
        statistics = {"reward": 0.0 - losses.mean().item()} if isinstance(objective, Generates) else {}
        if found.is_flat or not objective.differentiable:
            statistics["skipped"] = int(found.is_flat)
        if self.config.group_baseline == "standardize":
            statistics["examples_left_out"] = found.left_out
        if self.config.antithetic:
            statistics |= pair_statistics(found.values, self.config.sigma)
            if not objective.differentiable:  # rewards are often equal
                statistics["tied_pairs"] = self.watch.see(found.values)
        return statistics

    def _evaluate(
        self,
        engine: Engine,
        objective: Objective,
        batch: Any,
        names: Collection[str],
        members: list[Member],
        examples: Tensor | None,
    ) -> Tensor:
        """Losses of each member on its examples, (members, k) float32 in main memory. Ranks deal the members out and exchange them."""
        dealt = engine.ranks.deal(len(members), together=2 if self.config.antithetic else 1)
        mine = dealt[engine.ranks.rank]
        own_examples = None if examples is None else examples[mine]
        losses = self.perturbation.evaluate(engine, objective, batch, names, [members[i] for i in mine], own_examples)
        result = torch.empty(len(members), losses.shape[1])
        result[torch.tensor(dealt)] = engine.ranks.gather(losses.cpu())
        return result

    def _members(self, key: Key) -> list[Member]:
        n = self.config.population_size
        if not self.config.antithetic:
            return [Member(key.fold(i), 1) for i in range(n)]
        return [Member(key.fold(i), sign) for i in range(n // 2) for sign in (1, -1)]

    def _examples(self, batch: Any, key: Key, members: int) -> Tensor | None:
        """Numbers of the examples that each member sees, (members, k) int64; None for a batch without tensors.

        Examples are drawn without replacement: the same for all members (common random numbers), or others for each
        antithetic pair.
        """
        count, wanted, pairs = count_examples(batch), self.config.examples_per_step, members // 2
        if count is None:
            if wanted or self.config.distinct_examples:
                raise UserError(
                    "examples_per_step and distinct_examples need a batch with tensors, to take examples from"
                )
            return None
        if not (wanted or self.config.distinct_examples):
            return torch.arange(count).expand(members, count)
        groups = pairs if self.config.distinct_examples else 1
        each = wanted or count // groups
        if not 0 < groups * each <= count:
            raise UserError(
                f"a step needs {groups * max(1, each)} different examples, but its batch has {count}; raise batch_size, or lower "
                + ("population_size or examples_per_step" if groups > 1 else "examples_per_step")
            )
        order = np.random.Generator(np.random.Philox(key.fold("examples").seed())).permutation(count)
        drawn = torch.from_numpy(order[: groups * each]).view(groups, each)
        return drawn.repeat_interleave(members // groups, dim=0)

    def _coefficients(self, members: Sequence[Member], weights: Tensor) -> Tensor:
        scale = len(members) * (self.config.sigma if self.config.divide_by_sigma else 1.0)
        return weights * torch.tensor([m.sign for m in members]) / scale

    def _check(self, losses: Tensor) -> None:
        if not (finite := losses.isfinite()).all():
            bad = int((~finite).sum())
            raise DivergedError(
                f"the loss of {bad} of {len(losses)} members is not finite; lower sigma ({self.config.sigma}) or the "
                "learning rates"
            )


def observed(tally: Tally, ranks: Ranks) -> tuple[dict[str, float], int]:
    """What an objective that generates has seen since it was last asked, as means over all ranks, and the tokens written."""
    seen = tally.take()
    sums = ranks.gather(torch.tensor(list(seen.values()), dtype=torch.float64)).sum(dim=0).tolist()
    totals = {name: total for name, (total, _) in zip(seen, sums, strict=True)}
    means = {name: total / max(1, count) for name, (total, count) in zip(seen, sums, strict=True)}
    return means | {"reward_errors": totals["reward_errors"]}, int(totals["completion_tokens"])


def pair_statistics(losses: Tensor, sigma: float) -> dict[str, float]:
    """What antithetic losses tell of the estimate; losses: (members,), the two of a pair side by side.

    `gradient_norm = sqrt(mean_j ((L+_j - L-_j) / (2 sigma))^2)`, for a linear loss the norm of the gradient, without bias in its
    square. `snr`, from three pairs on: the variance of the pairs' odd parts `(L+ - L-)/2`, which the estimate is made of, over that
    of their even parts `(L+ + L-)/2`, in which curvature and, with distinct_examples, the choice of examples show.
    The correlation of antithetic losses is `(1 - snr) / (1 + snr)`.
    """
    odd, even = odd_and_even(losses)
    statistics = {"gradient_norm": (odd / sigma).square().mean().sqrt().item()}
    if len(odd) > 2 and (noise := even.var().item()) > 0:
        statistics["snr"] = odd.square().mean().item() / noise
    return statistics


def _merge_pairs(estimate: NoiseSum) -> NoiseSum:
    """Both members of an antithetic pair have the same noise, so it need be generated only once."""
    return NoiseSum(estimate.perturbation, estimate.keys[::2], estimate.coefficients.view(-1, 2).sum(dim=1))


def _tokens(batch: Any, examples: Tensor | None, members: int) -> int:
    if examples is None:
        return members * count_tokens(batch)
    times = torch.bincount(examples.flatten()).tolist()
    return sum(n * count_tokens(select(batch, torch.tensor([i]))) for i, n in enumerate(times) if n)


def _build_perturbation(config: EvolutionStrategy) -> Perturbation:
    members = None if config.members_per_forward == "auto" else config.members_per_forward
    size = ForwardSize(members, config.micro_batch_size)
    form = config.perturbation
    if isinstance(form, DenseConfig):
        return DensePerturbation(form.distribution, config.sigma, whole_model=form.backup == "model", forward_size=size)
    return LowRankPerturbation(form.noise_rank, config.sigma, otherwise=form.otherwise, forward_size=size)
