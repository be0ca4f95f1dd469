"""The engine for one process: weights in plain torch tensors. Next: `../training/attribution.py`.

One idea: updates are always written to master weights. For a float32 model these are the model's own weights; for a
narrower one they are a float32 copy, from which the model's weights are rounded after each step.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_opt.config.schedule import Backprop
from hybrid_opt.engines.contract import Contribution, Shard
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.contract import WeightedSum


class LocalEngine:
    """Holds a `torch.nn.Module` on one device, with a torch optimizer for the parameters backprop may ever own.

    Args:
        model: any module; parameters with `requires_grad=False` stay out of everything. Moved to `device`.
        backprop: the backprop estimator's configuration, or None if there is none.
        names: parameters that backprop may ever own, over all phases.
        movable: parameters that anybody may ever move; None: all. Only these get master weights.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        master_weights: `float32` keeps a float32 copy of narrower weights; `none` updates them directly.

    Raises:
        UserError: unknown device, nothing to train, or arguments that the optimizer does not take.
    """

    def __init__(
        self,
        model: nn.Module,
        backprop: Backprop | None = None,
        names: Collection[str] = (),
        movable: Collection[str] | None = None,
        *,
        device: str = "auto",
        master_weights: str = "float32",
    ):
        self.device = _device(device)
        self.model = model.to(self.device)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise UserError("model: every parameter is frozen (requires_grad is False), so there is nothing to train")
        self.masters = {
            name: _master(p, master_weights)
            for name, p in self.parameters.items()
            if movable is None or name in movable
        }
        self.gradient_clipping = backprop.gradient_clipping if backprop else None
        self.optimizer = _optimizer(backprop, [self.masters[name] for name in self._ordered(names)])

    def shards(self, names: Collection[str]) -> Iterator[Shard]:
        """One shard a parameter: all of it."""
        for name in self._ordered(names):
            yield Shard(name, self.masters[name].data.view(-1), 0, self.parameters[name].shape)

    @torch.no_grad()
    def apply(self, contributions: Sequence[Contribution]) -> None:
        """See `Engine.apply`."""
        with_optimizer = next((c for c in contributions if c.rule is None), None)
        owned = set(with_optimizer.names) if with_optimizer else set()
        if with_optimizer:
            self._step_optimizer(contributions, owned, with_optimizer.learning_rate)
        for c in contributions:
            if c.rule is not None:
                for shard in self.shards(set(c.names) - owned):
                    gradient = WeightedSum([(c.weight, c.estimate)]).read(shard)
                    c.rule.update(shard.name, shard.data, gradient, c.learning_rate)
        self._refresh({name for c in contributions for name in c.names})

    def state_dict(self) -> dict[str, Any]:
        """Master weights, buffers and the optimizer's state."""
        optimizer = self.optimizer.state_dict() if self.optimizer else {"state": {}, "param_groups": []}
        return {
            "weights": {name: master.data for name, master in self.masters.items()},
            "buffers": self._buffers(),
            "optimizer": {**optimizer, "state": {str(i): values for i, values in optimizer["state"].items()}},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for name, master in self.masters.items():
            master.copy_(state["weights"][name])
        for name, buffer in self._buffers().items():
            buffer.copy_(state["buffers"][name])
        if self.optimizer:
            by_number = {int(i): values for i, values in state["optimizer"]["state"].items()}
            self.optimizer.load_state_dict({**state["optimizer"], "state": by_number})
        self._refresh(self.masters)

    def is_finite(self) -> bool:
        """Whether no weight that may move is infinite or NaN."""
        return all(bool(master.isfinite().all()) for master in self.masters.values())

    def _buffers(self) -> dict[str, Tensor]:
        """Buffers that belong to the model's state; others, such as tables of angles, are made by its code."""
        saved = self.model.state_dict()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in saved}

    def _ordered(self, names: Collection[str]) -> list[str]:
        """The names in the model's order, so that a run does not depend on how a set happens to be ordered."""
        return [name for name in self.masters if name in names]

    def _step_optimizer(self, contributions: Sequence[Contribution], owned: set[str], learning_rate: float) -> None:
        for shard in self.shards(owned):
            terms = [(c.weight, c.estimate) for c in contributions if shard.name in c.names]
            self.masters[shard.name].grad = WeightedSum(terms).read(shard).view(shard.shape).to(shard.data.dtype)
        masters = [self.masters[name] for name in self._ordered(owned)]
        if self.gradient_clipping is not None:
            nn.utils.clip_grad_norm_(masters, self.gradient_clipping)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _refresh(self, names: Collection[str]) -> None:
        """Round the masters to the model's weights where the two are not one."""
        for name in names:
            if self.masters[name] is not self.parameters[name]:
                self.parameters[name].data.copy_(self.masters[name])


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"engine.device: {name!r} cannot be used: {problem}; write auto or cpu") from None


def _master(parameter: nn.Parameter, master_weights: str) -> Tensor:
    if parameter.dtype == torch.float32 or master_weights == "none":
        return parameter
    return nn.Parameter(parameter.detach().float().clone())


def _optimizer(backprop: Backprop | None, masters: list[Tensor]) -> torch.optim.Optimizer | None:
    if backprop is None or not masters:
        return None
    try:
        return getattr(torch.optim, backprop.optimizer)(
            masters, lr=backprop.learning_rate, **backprop.optimizer_arguments
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"optimizer_arguments: torch.optim.{backprop.optimizer} does not take "
            f"{backprop.optimizer_arguments}: {error}"
        ) from None
