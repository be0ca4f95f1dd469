"""From losses of members on examples to a fitness for each member. Next: `shaping.py`.

One idea: members are compared on what they all saw. What is the same for all of them (a hard example, a reward that nobody got) says
nothing about the directions, and is taken out, left out or counted here, before anything is shaped.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fitness:
    """What members are judged by."""

    values: Tensor
    """One for each member, (members,) float64; lower is better."""
    left_out: int = 0
    """Examples on which all members that saw them agree, where they are left out (`standardize`)."""

    @property
    def is_flat(self) -> bool:
        """Whether no member is better than another, so that there is nothing to learn from the step."""
        return bool((self.values == self.values[0]).all())


def worst_for_missing(losses: Tensor, missing: Tensor, *, by_example: bool = False) -> Tensor:
    """The losses with the largest known one in place of those that are missing; 0 if none is known.

    Args:
        losses: (members, k), or of any shape if not by example.
        missing: bool, of the same shape.
        by_example: take the largest of each column, so that a member without any loss is compared on each example, and is the worst.
    """
    known = losses.masked_fill(missing, -torch.inf)
    worst = known.amax(dim=0) if by_example else known.max()
    return torch.where(missing, worst.masked_fill(worst.isneginf(), 0.0), losses)


def fitness(losses: Tensor, examples: Tensor | None, group_baseline: str) -> Fitness:
    """Mean over a member's examples of its losses, or of how they compare with other members' on the same example.

    With `mean` that is `L_me - mean_m L_me`, with `standardize` `(L_me - mean_m L_me) / std_m L_me` (GRPO, arXiv 2402.03300), both over the
    members that saw example e; an example of zero variance is left out.

    Args:
        losses: (members, k) floating point.
        examples: numbers of the examples that each member saw, (members, k) int64; None: all saw the same one.
    """
    if group_baseline == "none" or examples is None:
        return Fitness(losses.mean(dim=1).double())
    losses, members = losses.double(), len(losses)
    groups, group = torch.unique(examples.cpu(), return_inverse=True)
    flat, group = losses.flatten(), group.flatten().to(losses.device)

    def of_each_group(values: Tensor) -> Tensor:
        return torch.zeros(len(groups), dtype=values.dtype, device=values.device).index_add_(0, group, values)

    counts = of_each_group(torch.ones_like(flat))
    lowest, highest = (
        torch.full_like(counts, bound).scatter_reduce_(0, group, flat, reduce)
        for bound, reduce in ((torch.inf, "amin"), (-torch.inf, "amax"))
    )
    centred = flat - (of_each_group(flat) / counts)[group]
    if group_baseline == "mean":
        return Fitness(_without_rounding(centred, (lowest == highest)[group]).view(members, -1).mean(dim=1))
    deviation = (of_each_group(centred.square()) / counts).sqrt()
    agree = lowest == highest
    scores = _without_rounding(centred / deviation.masked_fill(agree, 1.0)[group], agree[group])
    return Fitness(scores.view(members, -1).mean(dim=1), int(agree.sum()))


def _without_rounding(scores: Tensor, agree: Tensor) -> Tensor:
    """Exactly 0 where members agree: a mean of equal numbers may differ from them by a rounding error."""
    return scores.masked_fill(agree, 0.0)
