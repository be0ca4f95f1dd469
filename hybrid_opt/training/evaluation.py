"""Mean measures over held-out batches. Next: `trainer.py`."""

from collections.abc import Sequence
from typing import Any

import torch

from hybrid_opt.engines.contract import Engine
from hybrid_opt.estimators.modes import training_mode
from hybrid_opt.objectives.contract import Objective, to_device


@torch.no_grad()
def evaluate(engine: Engine, objective: Objective, batches: Sequence[Any]) -> dict[str, float]:
    """Mean of each of the objective's measures over all examples, dropout off, in float64. Ranks deal the batches out."""
    ranks = engine.ranks
    dealt = ranks.deal(len(batches))
    others_have = {number for numbers in dealt[: ranks.rank] for number in numbers}
    totals: dict[str, float] = {}
    examples = 0
    with training_mode(engine.model, False):
        for number in dealt[ranks.rank]:
            measures = objective.measures(engine.model, to_device(batches[number], engine.device))
            counts = number not in others_have
            examples += counts * len(measures["loss"])
            for name, values in measures.items():
                totals[name] = totals.get(name, 0.0) + counts * values.double().sum().item()
    examples, *sums = ranks.gather(torch.tensor([examples, *totals.values()], dtype=torch.float64)).sum(dim=0).tolist()
    return {name: total / examples for name, total in zip(totals, sums, strict=True)}
