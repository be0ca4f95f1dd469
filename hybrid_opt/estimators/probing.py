"""Losses at perturbed weights: what every estimator without a gradient begins with. Next: `fitness.py`, `es.py`.

One idea: members are dealt out to ranks, evaluated and exchanged in one place, and what becomes of losses that are not finite is decided
there too; an estimator only says which members it wants and what it makes of their losses.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid_opt.config.probing import Probing
from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.engines.ranks import Ranks
from hybrid_opt.errors import DivergedError, UserError
from hybrid_opt.estimators.contract import Cost, zeros_and
from hybrid_opt.estimators.fitness import worst_for_missing
from hybrid_opt.estimators.modes import training_mode
from hybrid_opt.estimators.pairs import odd_and_even, pair_statistics
from hybrid_opt.noise.keys import Key
from hybrid_opt.objectives.contract import Generates, Objective, Tally, count_examples, count_tokens, select
from hybrid_opt.perturbations.contract import Member, Perturbation


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


@dataclass(frozen=True)
class Probed:
    """What an evaluation of members has shown."""

    losses: Tensor
    """(members, k) float32 in main memory, all finite: a member whose mean loss is not has the largest of the others' on each example."""
    known: Tensor
    """Which directions were evaluated with finite losses alone, (directions,) bool."""
    examples: Tensor | None
    """Numbers of the examples that each member saw, (members, k) int64; None for a batch without tensors."""
    cost: Cost
    """Empty if too many members' losses are not finite, so that nothing is to be made of the others."""

    @property
    def means(self) -> Tensor:
        """Mean loss of each member, (members,) float32."""
        return self.losses.mean(dim=1)

    def slopes(self, sigma: float) -> Tensor:
        """`(L+ - L-) / (2 sigma)` of each pair, (pairs,) float64; 0 for one that is not known, which so counts for nothing: the largest
        loss in place of one that is not finite would be a slope that nobody has seen."""
        return (odd_and_even(self.means)[0] / sigma).masked_fill(~self.known, 0.0)

    def pair_statistics(self, sigma: float) -> dict[str, float]:
        """See `pairs.pair_statistics`; of the pairs that are known."""
        return pair_statistics(self.means.view(-1, 2)[self.known].flatten(), sigma)


@dataclass(frozen=True)
class Probe:
    """One estimator's evaluations in a step: the weights, what is minimised, and the options that all its members share.

    Args:
        names: parameters that are perturbed.
        key: of the step; decides which examples are drawn and, for an objective that samples, its random numbers.
    """

    config: Probing
    engine: Engine
    objective: Objective
    batch: Any
    names: Collection[str]
    key: Key

    def __call__(self, perturbation: Perturbation, members: Sequence[Member], together: int = 1) -> Probed:
        """Evaluate members; ranks deal them out, in runs of `together`, which share a direction, and exchange the losses.

        A missing reward counts as the worst of the evaluation, and so does a member whose mean loss is not finite; these are counted
        (`nonfinite_members`).

        Raises:
            DivergedError: the loss of a member that is not perturbed is not finite.
            UserError: the batch has too few examples.
        """
        engine, objective = self.engine, self.objective
        examples = self._examples(len(members))
        generates = isinstance(objective, Generates)
        batch = objective.seeded(self.batch, self.key) if generates else self.batch
        dealt = engine.ranks.deal(len(members), together)
        mine = dealt[engine.ranks.rank]
        own = None if examples is None else examples[mine]
        with training_mode(engine.model, False):
            found = perturbation.evaluate(engine, objective, batch, self.names, [members[i] for i in mine], own)
        losses = torch.empty(len(members), found.shape[1])
        losses[torch.tensor(dealt)] = engine.ranks.gather(found.cpu())
        losses = worst_for_missing(losses, losses.isnan()) if generates else losses
        lost = self._lost(losses.mean(dim=1), members)
        known = ~lost.view(-1, together).any(dim=1)
        cost = self._cost(losses.mean(dim=1)[~lost], examples, len(members))
        perturbed = sum(member.sign != 0 for member in members)
        too_few = known.sum() * together < min(2, len(members))  # to compare
        if too_few or lost.sum() > self.config.max_nonfinite * perturbed:
            cost = replace(cost, statistics={**cost.statistics, "skipped": 1}, is_empty=True)
        losses = worst_for_missing(losses, lost[:, None].expand_as(losses), by_example=True)
        return Probed(losses, known, examples, cost)

    def _lost(self, means: Tensor, members: Sequence[Member]) -> Tensor:
        """Which members' mean loss is not finite, (members,) bool."""
        lost = ~means.isfinite()
        if any(member.sign == 0 and is_lost for member, is_lost in zip(members, lost.tolist(), strict=True)):
            raise DivergedError("the loss at the weights as they are is not finite; lower the learning rates")
        return lost

    def _cost(self, means: Tensor, examples: Tensor | None, members: int) -> Cost:
        """What an evaluation took and saw; means: of the members that have a loss, float32."""
        generates = isinstance(self.objective, Generates)
        seen, written = observed(self.objective.tally, self.engine.ranks) if generates else ({}, 0)
        loss = means.mean().item() if len(means) else None
        reward = {"reward": 0.0 - loss} if generates and loss is not None else {}
        lost = {"nonfinite_members": members - len(means)} if len(means) < members else {}
        return Cost(
            loss=loss,
            forwards=members,
            backwards=0,
            forward_equivalents=members if examples is None else examples.numel() / count_examples(self.batch),
            tokens=_tokens(self.batch, examples, members) + written,
            loss_spread=means.std(correction=0).item() if len(means) else None,
            statistics=reward | seen | lost,
        )

    def _examples(self, members: int) -> Tensor | None:
        """Numbers of the examples that each member sees, (members, k) int64; None for a batch without tensors.

        Examples are drawn without replacement: the same for all members (common random numbers), or others for each of the
        estimator's groups of examples.
        """
        count, wanted, groups = count_examples(self.batch), self.config.examples_per_step, self.config.example_groups
        if count is None:
            if wanted or groups > 1:
                raise UserError(
                    "examples_per_step and distinct_examples need a batch with tensors, to take examples from"
                )
            return None
        if not (wanted or groups > 1):
            return torch.arange(count).expand(members, count)
        each = wanted or count // groups
        if not 0 < groups * each <= count:
            raise UserError(
                f"a step needs {groups * max(1, each)} different examples, but its batch has {count}; raise batch_size, or lower "
                + ("population_size or examples_per_step" if groups > 1 else "examples_per_step")
            )
        order = np.random.Generator(np.random.Philox(self.key.fold("examples").seed())).permutation(count)
        drawn = torch.from_numpy(order[: groups * each]).view(groups, each)
        return drawn.repeat_interleave(members // groups, dim=0)


def nothing(perturbation: Perturbation, keys: Sequence[Key]) -> NoiseSum:
    """The estimate of a step that is skipped."""
    return NoiseSum(perturbation, keys, torch.zeros(len(keys), dtype=torch.float64))


def pairs_of(keys: Sequence[Key]) -> list[Member]:
    """Both members of an antithetic pair for each direction, side by side."""
    return [Member(key, sign) for key in keys for sign in (1, -1)]


def added(first: Cost, second: Cost) -> Cost:
    """The cost of two evaluations of one step; loss and statistics are the second's."""
    return replace(
        second,
        forwards=first.forwards + second.forwards,
        backwards=first.backwards + second.backwards,
        forward_equivalents=first.forward_equivalents + second.forward_equivalents,
        tokens=first.tokens + second.tokens,
    )


def observed(tally: Tally, ranks: Ranks) -> tuple[dict[str, float], int]:
    """What an objective that generates has seen since it was last asked, as means over all ranks, and the tokens written."""
    seen = tally.take()
    sums = ranks.gather(torch.tensor(list(seen.values()), dtype=torch.float64)).sum(dim=0).tolist()
    totals = {name: total for name, (total, _) in zip(seen, sums, strict=True)}
    means = {name: total / max(1, count) for name, (total, count) in zip(seen, sums, strict=True)}
    return means | {"reward_errors": totals["reward_errors"]}, int(totals["completion_tokens"])


def _tokens(batch: Any, examples: Tensor | None, members: int) -> int:
    if examples is None:
        return members * count_tokens(batch)
    times = torch.bincount(examples.flatten()).tolist()
    return sum(n * count_tokens(select(batch, torch.tensor([i]))) for i, n in enumerate(times) if n)
