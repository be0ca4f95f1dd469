"""How far an estimate points along the exact gradient. Next: `../training/hybrid_optimizer.py`.

One idea: where both act in a step, applying it reads both for the same shards, and that is the moment to take their inner products:
no noise is drawn twice.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Shard
from hybrid_opt.engines.ranks import Ranks
from hybrid_opt.estimators.contract import Estimate, zeros_and
from hybrid_opt.objectives.contract import Objective


class Compared:
    """An estimate that is compared with a reference while it is read, on the parameters that the reference is for.

    Args:
        names: parameters of the reference.
    """

    def __init__(self, estimate: Estimate, reference: Estimate, names: Collection[str]) -> None:
        self.estimate, self.reference, self.names = estimate, reference, names
        self.products: list[Tensor] = []
        """For each shard, on its device, inner products: of estimate and reference, of the estimate with itself, of the reference
        with itself."""

    def read(self, shard: Shard) -> Tensor:
        """See `Estimate.read`."""
        return zeros_and(self, shard)

    def add_to(self, out: Tensor, shard: Shard, factor: float) -> None:
        """See `Estimate.add_to`."""
        if shard.name not in self.names:
            self.estimate.add_to(out, shard, factor)
            return
        own, other = self.estimate.read(shard), self.reference.read(shard)
        self.products.append(torch.stack([own.dot(other), own.dot(own), other.dot(other)]))
        out.add_(own, alpha=factor)

    def statistics(self, ranks: Ranks) -> dict[str, float]:
        """`cosine`, of the angle between the two, and `rho2 = cosine^2`, the share of the reference's energy that lies along the
        estimate; nothing where one of them is zero. All ranks ask together."""
        mine = torch.stack(self.products or [torch.zeros(3)]).cpu().double().sum(dim=0)  # fetched from the device once
        both, own, other = ranks.gather(mine).sum(dim=0).tolist()
        if not own * other:
            return {}
        return {"cosine": both / (own * other) ** 0.5, "rho2": both**2 / (own * other)}


def compared_with(
    gradient: str | None,
    estimates: Mapping[str, Estimate],
    owned: Mapping[str, Collection[str]],
    objectives: Mapping[str, Objective],
    batches: Mapping[str, Any],
) -> dict[str, Compared]:
    """The other estimates of a step in which backprop acts, each compared with the gradient where both move the same to minimise the same
    on the same examples.

    Args:
        gradient: the name of backprop's estimate; None: it does not act.
        owned: parameters that each estimator may move.
        objectives: those that are not the run's.
        batches: those that are not the step's.
    """
    if gradient is None:
        return {}
    return {
        name: Compared(estimate, estimates[gradient], frozenset(owned[gradient]))
        for name, estimate in estimates.items()
        if name != gradient
        and objectives.get(name) is objectives.get(gradient)
        and batches.get(name) is batches.get(gradient)
        and not set(owned[gradient]).isdisjoint(owned[name])
    }
