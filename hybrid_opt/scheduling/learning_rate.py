"""The course of a learning rate over a run, by transformers' names. Next: `../estimators/contract.py`."""

from collections.abc import Callable

import torch
from transformers import get_scheduler

from hybrid_opt.config.steps import LearningRate
from hybrid_opt.errors import UserError

INDEPENDENT_OF_LENGTH = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules that are the same whatever the number of steps in the run."""


def learning_rate_at(config: LearningRate, steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step (0-based) in a run of `steps` steps.

    transformers' schedules are multipliers of the peak, functions of the step alone, so nothing needs to be remembered
    between steps or saved with a checkpoint.
    """
    placeholder = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    warmup = config.warmup_steps
    schedule = get_scheduler(
        config.learning_rate_schedule, placeholder, num_warmup_steps=warmup, num_training_steps=steps
    )
    return lambda step: config.learning_rate * schedule.lr_lambdas[0](step)


def learning_rate_of(estimator: str, config: LearningRate, steps: int | None) -> Callable[[int], float]:
    """The learning rate of an estimator in a run of so many steps; None: nobody knows how many.

    Raises:
        UserError: it depends on the number of steps.
    """
    if steps is None and config.learning_rate_schedule not in INDEPENDENT_OF_LENGTH:
        raise UserError(
            f"estimators.{estimator}.learning_rate_schedule: {config.learning_rate_schedule!r} depends on the number of steps of the run; "
            "say it: training.steps in a run file (with a budget: the most steps), steps=... in Python"
        )
    return learning_rate_at(config, steps or 0)
