"""What a step refuses: names that there are not, objectives without the gradient that is asked for, numbers that are not finite.
Next: `hybrid_optimizer.py`.

One idea: each message says what is wrong, where, and what to write instead.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from hybrid_opt.config.loading import differences
from hybrid_opt.config.schedule import ScheduleFile, acting_names
from hybrid_opt.errors import DivergedError, UserError, did_you_mean
from hybrid_opt.estimators.contract import Cost
from hybrid_opt.objectives.contract import Objective

TAMING = ("learning_rate", "gradient_clipping", "max_nonfinite")
"""Options of an estimator that may change where a run goes on: the message about a diverging run advises to change them."""

MOST_LOST_STEPS = 10
"""Steps in a row that may be skipped because losses are not finite; more of them would be a run that does nothing."""


def refuse_unknown(names: Iterable[str], config: ScheduleFile, where: str) -> None:
    """Raise UserError for a name that is none of the schedule's estimators."""
    for name in names:
        if name not in config.estimators:
            known = config.estimators
            raise UserError(
                f"{where}: {name!r} is none of the schedule's estimators {list(known)}{did_you_mean(name, known)}"
            )


def refuse_other_setup(state: Mapping[str, Any], setup: Mapping[str, Any]) -> None:
    """Whether a state was saved by an optimizer of the same schedule and seed, so that going on with it is going on.

    Raises:
        UserError: naming the first thing that differs, or it is no such state at all.
    """
    if "setup" not in state:
        known = ", ".join(map(str, list(state)[:3])) or "nothing"
        raise UserError(
            f"state: it is not what HybridOptimizer.state_dict gave: it has no 'setup', but {known}; load a model's own state into the model"
        )
    for key, before, after in differences(state["setup"], setup):
        if key.rpartition(".")[2] not in TAMING:
            raise UserError(
                f"cannot go on from this state, because {key} was {before!r} and is now {after!r}; change it back, or start anew from the weights "
                "alone"
            )


def refuse_missing_gradient(
    config: ScheduleFile, objective: Objective | None, objectives: Mapping[str, Objective]
) -> None:
    """Raise UserError for an estimator that acts and differentiates where its objective has no gradient."""
    for name in acting_names(config.schedule):
        own = objectives.get(name, objective)
        if config.estimators[name].differentiates and own and not own.differentiable:
            raise UserError(
                f"schedule: {name!r} is {config.estimators[name].type}, but the objective has no gradient; use a schedule of es alone, or give "
                f"{name!r} an objective of its own (objectives)"
            )


def refuse_not_finite(cost: Cost) -> None:
    """Raise DivergedError if the loss of an estimate is not finite."""
    if cost.loss is not None and not math.isfinite(cost.loss):
        raise DivergedError(
            f"the loss is {cost.loss}; lower the learning rates, or clip gradients with gradient_clipping"
        )


def refuse_too_many_lost(costs: Mapping[str, Cost], step: int, lost_steps: int) -> bool:
    """Whether a step without any estimate is so because losses were not finite.

    Args:
        lost_steps: how many such steps came right before.

    Raises:
        DivergedError: there were too many.
    """
    is_lost = any(cost.nonfinite_members for cost in costs.values())
    if is_lost and lost_steps + 1 >= MOST_LOST_STEPS:
        raise DivergedError(
            f"step {step}: in {MOST_LOST_STEPS} steps in a row more members than max_nonfinite allows had a loss that is not finite, so "
            "nothing has moved; lower sigma or the learning rates"
        )
    return is_lost
