"""Evolution strategies: a gradient estimate from a population's fitness. Next: `spsa.py`, then `backprop.py`.

One idea: the estimate is `sum_i c_i * noise(key_i)`, so it is kept as N coefficients and N keys, and any process can
regenerate any slice of it.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.config.probing import EvolutionStrategy
from hybrid_opt.engines.contract import Engine
from hybrid_opt.estimators.contract import Cost
from hybrid_opt.estimators.fitness import Fitness, fitness
from hybrid_opt.estimators.pairs import pair_statistics
from hybrid_opt.estimators.population import PopulationWatch
from hybrid_opt.estimators.probing import NoiseSum, Probe, Probed, nothing, pairs_of
from hybrid_opt.estimators.shaping import FITNESS_SHAPING
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Objective
from hybrid_opt.perturbations.build import build_perturbation
from hybrid_opt.perturbations.contract import Member


class EsEstimator:
    """Evolution strategies with a population of N members.

    `g = 1/(N sigma) sum_i w_i s_i eps_i`, with w the shaped losses of the members and s their signs. With antithetic pairs
    and no shaping this is n-SPSA, `1/(2 q sigma) sum_j (L+_j - L-_j) eps_j` with q = N/2 pairs. With
    `divide_by_sigma=False` the factor is 1/N (EA4LLM, arXiv 2510.10603; ES at Scale, arXiv 2509.24372).

    A member whose loss is not finite is the worst where members are ranked or scaled against each other (`ranks_members`); where their
    losses themselves make the estimate, it and its partner count for nothing, and the others are shaped as if they were all.
    """

    def __init__(self, config: EvolutionStrategy) -> None:
        self.config = config
        self.perturbation = build_perturbation(config)
        self.watch = PopulationWatch()

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`."""
        self.perturbation.check(engine, names)

    @torch.no_grad()
    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[NoiseSum, Cost]:
        """See `Estimator.estimate`.

        Raises:
            UserError: see `Probe`.
        """
        together = 2 if self.config.antithetic else 1
        keys = [key.fold(i) for i in range(self.config.population_size // together)]
        members = pairs_of(keys) if self.config.antithetic else [Member(k, 1) for k in keys]
        perturbation = self.perturbation.ready(engine, names, keys, key)
        probed = Probe(self.config, engine, objective, batch, names, key)(perturbation, members, together)
        if probed.cost.is_empty:
            return nothing(perturbation, keys), probed.cost
        known = probed.known.repeat_interleave(together)
        counts = torch.ones_like(known) if self.config.ranks_members else known
        found = self._fitness(probed, counts)
        weights = torch.zeros(len(members), dtype=torch.float64)
        weights[counts] = FITNESS_SHAPING[self.config.fitness_shaping](found.values)
        # Both members of a pair have the same noise, so it need be generated only once.
        coefficients = self._coefficients(members, weights).view(-1, together).sum(dim=1)
        statistics = {**probed.cost.statistics, **self._statistics(found, known[counts], objective)}
        return (
            NoiseSum(perturbation, keys, coefficients),
            replace(probed.cost, statistics=statistics, is_empty=found.is_flat),
        )

    def _fitness(self, probed: Probed, counts: Tensor) -> Fitness:
        examples = None if probed.examples is None else probed.examples[counts]
        return fitness(probed.losses[counts], examples, self.config.group_baseline)

    def _statistics(self, found: Fitness, known: Tensor, objective: Objective) -> dict[str, float]:
        """What the fitness tells.

        Args:
            known: which of its members belong to a direction of which all losses are known, bool.
        """
        statistics = {}
        if found.is_flat or not objective.differentiable:
            statistics["skipped"] = int(found.is_flat)
        if self.config.group_baseline == "standardize":
            statistics["examples_left_out"] = found.left_out
        if self.config.antithetic:
            statistics |= pair_statistics(found.values[known], self.config.sigma)
            if not objective.differentiable and known.all():  # rewards are often equal
                statistics["tied_pairs"] = self.watch.see(found.values)
        return statistics

    def _coefficients(self, members: Sequence[Member], weights: Tensor) -> Tensor:
        scale = len(members) * (self.config.sigma if self.config.divide_by_sigma else 1.0)
        return weights * torch.tensor([m.sign for m in members]) / scale
