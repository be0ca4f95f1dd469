"""The torch optimizer that backprop steps go through. Next: `local.py`."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.config.estimators import Backprop
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
    for values in optimizer.state.values():  # Adagrad makes its sum at once, in the dtype of the weights
        values.update({key: value.float() for key, value in values.items() if isinstance(value, Tensor)})
    return optimizer


def first_moment_key(state: Mapping[str, Any]) -> str | None:
    """Under which name an optimizer keeps a parameter's first moment; None: it keeps none, or has not stepped yet."""
    return next((key for key in FIRST_MOMENTS if isinstance(state.get(key), Tensor)), None)
