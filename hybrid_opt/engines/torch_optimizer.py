"""The torch optimizer that backprop steps go through, and what becomes of its state after a rest. Next: `local.py`."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.engines.update_rules import Treatment
from hybrid_opt.errors import UserError

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""What torch's optimizers call a running mean or sum of gradients."""


def build_optimizer(backprop: Backprop, parameters: Iterable) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, for parameters or groups of them.

    Raises:
        UserError: arguments that the optimizer does not take.
    """
    try:
        optimizer = getattr(torch.optim, backprop.optimizer)(
            parameters, lr=backprop.learning_rate, **backprop.optimizer_arguments
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"optimizer_arguments: torch.optim.{backprop.optimizer} does not take "
            f"{backprop.optimizer_arguments}: {error}"
        ) from None
    _widen_state(optimizer)
    return optimizer


def after_rest(optimizer: torch.optim.Optimizer, treatment: Treatment, steps: int) -> None:
    """Steps were taken without the optimizer: `decay` its state as if the gradients in them had been 0, or make it what it was at the start.

    `momentum_buffer <- momentum^steps momentum_buffer` (SGD); `exp_avg <- beta1^steps exp_avg`, `exp_avg_sq <- beta2^steps exp_avg_sq` and
    so many steps more (Adam, AdamW; the largest second moment of amsgrad would stay). Weights do not move, by weight decay neither.
    """
    if treatment == "reset":
        _reset_state(optimizer)
        return
    beta1, beta2 = optimizer.defaults.get("betas", (None, None))
    decays = {"momentum_buffer": optimizer.defaults.get("momentum"), "exp_avg": beta1, "exp_avg_sq": beta2}
    for values in optimizer.state.values():
        for key, decay in decays.items():
            if isinstance(values.get(key), Tensor):
                values[key].mul_(decay**steps)
        if "step" in values:
            values["step"] += steps


def _reset_state(optimizer: torch.optim.Optimizer) -> None:
    parameters = list(optimizer.state)
    optimizer.state.clear()
    if isinstance(optimizer, torch.optim.Adagrad):  # the only one whose state is there, and needed, before it steps
        optimizer.state.update(torch.optim.Adagrad(parameters, **optimizer.defaults).state)
        _widen_state(optimizer)


def _widen_state(optimizer: torch.optim.Optimizer) -> None:
    """Adagrad makes its sum at once, in the dtype of the weights; it is to be float32."""
    for values in optimizer.state.values():
        values.update({key: value.float() for key, value in values.items() if isinstance(value, Tensor)})


def first_moment_key(state: Mapping[str, Any]) -> str | None:
    """Under which name an optimizer keeps a parameter's first moment; None: it keeps none, or has not stepped yet."""
    return next((key for key in FIRST_MOMENTS if isinstance(state.get(key), Tensor)), None)
