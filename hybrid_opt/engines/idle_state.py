"""Optimizer state that leaves the device while nothing needs it. Next: `build.py`.

One idea: after so many steps without the optimizer its state and the gradient buffers go to main memory, and whoever needs them next
has them brought back first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.engines.zero_stages import Stage


class IdleState:
    """Counts steps without the optimizer.

    Args:
        optimizer: DeepSpeed's.
        after: number of such steps after which state goes; None: it stays.
        stays: whether the state is in main memory for good.
        buffers: puts gradient buffers away, and back; None: they stay.
    """

    def __init__(
        self,
        optimizer: Any,
        stage: Stage,
        device: torch.device,
        after: int | None,
        *,
        stays: bool,
        buffers: tuple[Callable[[], None], Callable[[], None]] | None,
    ) -> None:
        self.optimizer, self.stage, self.device = optimizer, stage, device
        self.after, self.stays, self.buffers = after, stays, buffers
        self.steps, self.is_away = 0, False

    def count(self, optimizer_acted: bool) -> None:
        """See a step."""
        self.steps = 0 if optimizer_acted else self.steps + 1
        if self.steps == self.after:
            self._move(self.device, torch.device("cpu"))
            if self.buffers:
                self.buffers[0]()
            self.is_away = True

    def bring_back(self) -> None:
        """The state is needed."""
        if self.is_away:
            self._move(torch.device("cpu"), self.device)
            if self.buffers:
                self.buffers[1]()
            self.steps, self.is_away = 0, False

    def _move(self, source: torch.device, target: torch.device) -> None:
        """DeepSpeed has a way of its own, which moves counts of steps too, where torch's optimizers do not want them."""
        if self.stays:
            return
        for values in self.optimizer.optimizer.state.values():
            for key, value in values.items():
                if isinstance(value, Tensor) and value.dim() and value.device.type == source.type:
                    values[key] = value.to(
                        target, copy=True
                    )  # on a processor too, so that tests there see what a GPU does
        self.stage.relink_state()
