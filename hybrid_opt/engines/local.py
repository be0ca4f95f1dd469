"""The engine for one process: weights in plain torch tensors. Next: `../training/attribution.py`.

One idea: updates are always added to float32 weights. For a float32 model these are the model's own; for a narrower one
they are a copy that is kept (master weights), or one parameter's copy made for the update and rounded back at once.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.engines.contract import Contribution, Shard
from hybrid_opt.engines.rounding import round_stochastically
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.contract import WeightedSum
from hybrid_opt.estimators.noise import Key


class LocalEngine:
    """Holds a `torch.nn.Module` on one device, with a torch optimizer for the parameters backprop may ever own.

    Args:
        model: any module; parameters with `requires_grad=False` stay out of everything. Moved to `device`.
        backprop: the backprop estimator's configuration, or None if there is none.
        names: parameters that backprop may ever own, over all phases.
        movable: parameters that anybody may ever move; None: all. Only these get master weights.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        master_weights: for weights narrower than float32: `fp32` keeps a float32 copy, `stochastic_rounding` rounds each
            update up or down at random (bfloat16 only), `none` rounds it to the nearest value.
        seed: decides the rounding.

    Raises:
        UserError: unknown device, nothing to train, arguments that the optimizer does not take, or stochastic rounding of
            another dtype than bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        backprop: Backprop | None = None,
        names: Collection[str] = (),
        movable: Collection[str] | None = None,
        *,
        device: str = "auto",
        master_weights: str = "fp32",
        seed: int = 0,
    ):
        self.device = _device(device)
        self.model = model.to(self.device)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise UserError("model: every parameter is frozen (requires_grad is False), so there is nothing to train")
        self.stochastic = master_weights == "stochastic_rounding"
        if self.stochastic:
            _refuse_other_dtypes(self.parameters)
        self.key = Key((seed, "rounding"))
        self.masters = {
            name: _master(p, keep=master_weights == "fp32")
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
    def apply(self, contributions: Sequence[Contribution], step: int) -> None:
        """See `Engine.apply`."""
        with_optimizer = next((c for c in contributions if c.rule is None), None)
        owned = set(with_optimizer.names) if with_optimizer else set()
        if with_optimizer:
            self._step_optimizer(contributions, owned, with_optimizer.learning_rate, step)
        direct = [(c, set(c.names) - owned) for c in contributions if c.rule is not None]
        for shard in self.shards(set().union(*(names for _, names in direct))):
            with self._wide(shard, step) as wide:
                for c, names in direct:
                    if shard.name in names:
                        c.rule.update(wide, c.estimate, c.weight, c.learning_rate)
            del wide  # before the next one is made
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
            with self._seen_as_float32():
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

    def _step_optimizer(
        self, contributions: Sequence[Contribution], owned: set[str], learning_rate: float, step: int
    ) -> None:
        for shard in self.shards(owned):
            terms = [(c.weight, c.estimate) for c in contributions if shard.name in c.names]
            self.masters[shard.name].grad = WeightedSum(terms).read(shard).view(shard.shape).to(shard.data.dtype)
        masters = {name: self.masters[name] for name in self._ordered(owned)}
        if self.gradient_clipping is not None:
            nn.utils.clip_grad_norm_(masters.values(), self.gradient_clipping)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if all(master.dtype == torch.float32 for master in masters.values()):
            self.optimizer.step()
        else:
            self._step_one_by_one(masters, step)
        self.optimizer.zero_grad(set_to_none=True)

    def _step_one_by_one(self, masters: dict[str, nn.Parameter], step: int) -> None:
        """Let the optimizer see each narrow weight in float32 while it steps; it leaves those without gradient alone."""
        gradients = {name: master.grad for name, master in masters.items()}
        self.optimizer.zero_grad(set_to_none=True)
        for shard in self.shards(masters):
            master = masters[shard.name]
            narrow = master.data
            with self._wide(shard, step) as wide:
                master.data = wide.data.view(shard.shape)
                master.grad = gradients.pop(shard.name).float()
                self.optimizer.step()
                master.grad, master.data = None, narrow
            del wide  # before the next one is made

    @contextmanager
    def _wide(self, shard: Shard, step: int) -> Iterator[Shard]:
        """The shard with float32 weights, which are rounded to its own at the end if it has narrower ones."""
        if shard.data.dtype == torch.float32:
            yield shard
            return
        wide = replace(shard, data=shard.data.float())
        yield wide
        if self.stochastic:
            round_stochastically(wide.data, shard.data, self.key.fold(shard.name), step, shard.start)
        else:
            shard.data.copy_(wide.data)

    @contextmanager
    def _seen_as_float32(self) -> Iterator[None]:
        """Inside, the optimizer takes all masters for float32, so that it does not round the moments that it loads."""
        own = {name: master.data for name, master in self.masters.items()}
        for master in self.masters.values():
            master.data = torch.empty(0, device=master.device)
        try:
            yield
        finally:
            for name, data in own.items():
                self.masters[name].data = data

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


def _master(parameter: nn.Parameter, *, keep: bool) -> nn.Parameter:
    if parameter.dtype == torch.float32 or not keep:
        return parameter
    return nn.Parameter(parameter.detach().float().clone())


def _refuse_other_dtypes(parameters: dict[str, nn.Parameter]) -> None:
    for name, p in parameters.items():
        if p.dtype not in (torch.float32, torch.bfloat16):
            raise UserError(
                f"engine.master_weights: stochastic_rounding rounds to bfloat16, but parameter {name} is "
                f"{str(p.dtype).removeprefix('torch.')}; write fp32, or load the model in bfloat16"
            )


def _optimizer(backprop: Backprop | None, masters: list[Tensor]) -> torch.optim.Optimizer | None:
    if backprop is None or not masters:
        return None
    try:
        optimizer = getattr(torch.optim, backprop.optimizer)(
            masters, lr=backprop.learning_rate, **backprop.optimizer_arguments
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"optimizer_arguments: torch.optim.{backprop.optimizer} does not take "
            f"{backprop.optimizer_arguments}: {error}"
        ) from None
    for values in optimizer.state.values():  # Adagrad makes its sum at once, in the dtype of the weights
        values.update({key: value.float() for key, value in values.items() if isinstance(value, Tensor)})
    return optimizer
