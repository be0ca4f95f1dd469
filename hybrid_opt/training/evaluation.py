"""Mean measures over held-out batches. Next: `trainer.py`."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hybrid_opt.estimators.modes import training_mode
from hybrid_opt.objectives.contract import Objective, to_device


@torch.no_grad()
def evaluate(model: nn.Module, objective: Objective, batches: Iterable[Any], device: torch.device) -> dict[str, float]:
    """Mean of each of the objective's measures over all examples, dropout off, in float64."""
    totals: dict[str, float] = {}
    examples = 0
    with training_mode(model, False):
        for batch in batches:
            measures = objective.measures(model, to_device(batch, device))
            examples += len(measures["loss"])
            for name, values in measures.items():
                totals[name] = totals.get(name, 0.0) + values.double().sum().item()
    return {name: total / examples for name, total in totals.items()}
