"""What forward and backward passes of a model take beside weights and gradients, found by pretending them. Next: `prediction.py`.

One idea: the run's own objective computes the losses of a batch of the run's own data on a model without values (`live_memory.py`).
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.run import Lora, Model
from hybrid_opt.estimators.backprop import can_checkpoint, checkpointing
from hybrid_opt.models.loading import untrained, with_adapters
from hybrid_opt.objectives.contract import Objective, map_tensors, select
from hybrid_opt.planning.live_memory import LiveMemory


class PretendedModel:
    """A model of fake tensors.

    Args:
        model, lora: as a run file has them.
        dtype: of the weights that forward passes use.
    """

    def __init__(self, model: Model, lora: Lora | None, dtype: str) -> None:
        self.mode = FakeTensorMode()
        with torch.device("meta"):
            self.module: nn.Module = with_adapters(untrained(model, getattr(torch, dtype)), lora)
        self._pretend()
        self.known: dict[tuple, Any] = {}
        """What was found before, as several ways to train may take the same passes."""
        self.movable = [name for name, p in self.module.named_parameters() if p.requires_grad]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers; tied ones count once."""
        return sum(t.nbytes for t in self._tensors())

    def backprop_bytes(
        self, config: Backprop, objective: Objective, batch: Any, examples: int, names: Collection[str]
    ) -> tuple[int, int]:
        """Bytes of the gradients of the named parameters, and what is there beside them at the peak of a step's passes.

        Args:
            examples: examples in a backward pass.
        """
        key = (config.gradient_checkpointing, config.autocast, objective, _shapes(batch), examples, frozenset(names))
        if key not in self.known:
            self.known[key] = self._backprop_bytes(config, objective, batch, examples, names)
        return self.known[key]

    def _backprop_bytes(
        self, config: Backprop, objective: Objective, batch: Any, examples: int, names: Collection[str]
    ) -> tuple[int, int]:
        parameters = dict(self.module.named_parameters())
        for name, p in parameters.items():
            p.requires_grad_(name in names)
        self.module.train()
        part = self._pretended(select(batch, torch.arange(examples)))
        checkpoints = config.gradient_checkpointing and can_checkpoint(self.module)
        with self._counted() as live, checkpointing(self.module, checkpoints):
            enabled = config.autocast is not None
            with torch.autocast("cpu", dtype=getattr(torch, config.autocast or "bfloat16"), enabled=enabled):
                losses = objective.losses(self.module, part)
            losses.float().sum().backward()
        gradients = sum(p.grad.nbytes for p in parameters.values() if p.grad is not None)
        for p in parameters.values():
            p.grad = None
        return gradients, max(0, live.peak - gradients)

    def forward_bytes(self, objective: Objective, batch: Any, rows: int, examples: int) -> int:
        """What is there at the peak of a forward pass without gradients.

        Args:
            rows: rows of the pass, each member's examples.
            examples: examples in the batch.
        """
        key = (objective, _shapes(batch), rows, examples)
        if key not in self.known:
            self.known[key] = self._forward_bytes(objective, batch, rows, examples)
        return self.known[key]

    def _forward_bytes(self, objective: Objective, batch: Any, rows: int, examples: int) -> int:
        self.module.eval()
        part = self._pretended(select(batch, torch.arange(rows) % examples))
        with torch.no_grad(), self._counted() as live:
            objective.losses(self.module, part)
        return live.peak

    def _pretend(self) -> None:
        """Put fake tensors of main memory in the place of those without any; tied ones stay tied."""
        made: dict[int, Tensor] = {}
        for module in self.module.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        if id(tensor) not in made:
                            with self.mode:
                                made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                            if isinstance(tensor, nn.Parameter):
                                made[id(tensor)] = nn.Parameter(made[id(tensor)], requires_grad=tensor.requires_grad)
                        tensors[name] = made[id(tensor)]

    def _pretended(self, batch: Any) -> Any:
        return map_tensors(self.mode.from_tensor, batch)

    @contextmanager
    def _counted(self) -> Iterator[LiveMemory]:
        live = LiveMemory(self._tensors())
        with self.mode, live:
            yield live

    def _tensors(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]


def _shapes(batch: Any) -> tuple[torch.Size, ...]:
    """Shapes of an example's tensors."""
    shapes: list[torch.Size] = []
    map_tensors(lambda tensor: shapes.append(tensor.shape[1:]) or tensor, batch)
    return tuple(shapes)
