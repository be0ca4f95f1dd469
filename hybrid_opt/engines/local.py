"""The engine for one process: weights in plain torch tensors. Next: `ranks.py`, then `zero.py`.

One idea: updates are always added to float32 weights, which `master_weights.py` provides where the model has narrower ones.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.engines.contract import Contribution, Shard
from hybrid_opt.engines.direct import moved_directly, update_directly
from hybrid_opt.engines.inspection import first_nonfinite
from hybrid_opt.engines.master_weights import MasterWeights
from hybrid_opt.engines.ranks import Ranks
from hybrid_opt.engines.torch_optimizer import after_rest, build_optimizer, first_moment_key
from hybrid_opt.engines.update_rules import Treatment
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.contract import Estimate, WeightedSum
from hybrid_opt.estimators.modes import requiring_grad


@dataclass(frozen=True)
class Gradients:
    """Gradients by parameter name."""

    by_name: dict[str, Tensor]

    def read(self, shard: Shard) -> Tensor:
        """A slice of the parameter's gradient, float32; zeros if the loss does not depend on the parameter."""
        gradient = self.by_name.get(shard.name)
        if gradient is None:
            return torch.zeros_like(shard.data, dtype=torch.float32)
        return gradient.reshape(-1)[shard.start : shard.start + shard.data.numel()].float()

    def add_to(self, out: Tensor, shard: Shard, factor: float) -> None:
        """See `Estimate.add_to`."""
        out.add_(self.read(shard), alpha=factor)

    def whole(self, name: str) -> Tensor | None:
        """See `Gradient.whole`."""
        gradient = self.by_name.get(name)
        return None if gradient is None else gradient.flatten().float()


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

    ranks = Ranks()
    independent_forwards = True
    memory_limit: int | None = None

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
    ) -> None:
        self.device = device_named(device)
        self.model = model.to(self.device)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise UserError("model: every parameter is frozen (requires_grad is False), so there is nothing to train")
        self.master_weights = MasterWeights(master_weights, seed)
        self.master_weights.check(self.parameters)
        self.masters = {
            name: nn.Parameter(p.detach().float().clone()) if self.master_weights.needed(p) else p
            for name, p in self.parameters.items()
            if movable is None or name in movable
        }
        self.gradient_clipping = backprop.gradient_clipping if backprop else None
        masters = [self.masters[name] for name in self._ordered(names)]
        self.optimizer = build_optimizer(backprop, masters) if backprop and masters else None

    def shards(self, names: Collection[str]) -> Iterator[Shard]:
        """One shard a parameter: all of it."""
        for name in self._ordered(names):
            yield Shard(name, self.masters[name].data.view(-1), 0, self.parameters[name].shape)

    def gradients(self, losses: Sequence[Callable[[], Tensor]], names: Collection[str]) -> tuple[Gradients, float]:
        """See `Engine.gradients`. Gradients are taken off the parameters, so nothing that runs later can change them."""
        total = 0.0
        parameters = {name: p for name, p in self.parameters.items() if name in names}
        with requiring_grad(self.parameters, names), _without_grad(parameters.values()):
            for loss_of in losses:
                loss = loss_of()
                loss.backward()
                total += loss.item()
            return Gradients({name: p.grad for name, p in parameters.items() if p.grad is not None}), total

    def first_moment(self, name: str) -> Tensor | None:
        """See `Engine.first_moment`."""
        state = self.optimizer.state.get(self.masters.get(name), {}) if self.optimizer else {}
        key = first_moment_key(state)
        return None if key is None else state[key].flatten().float()

    @torch.no_grad()
    def apply(self, contributions: Sequence[Contribution], step: int) -> None:
        """See `Engine.apply`."""
        owned, others = moved_directly(contributions)
        if owned:
            (rate,) = (c.learning_rate for c in contributions if c.rule is None)
            self._step_optimizer(contributions, owned, rate, step)
        update_directly(self.shards(others), contributions, self.master_weights, step)
        self._refresh(owned | others)

    def after_rest(self, treatment: Treatment, steps: int) -> None:
        """See `Engine.after_rest`."""
        after_rest(self.optimizer, treatment, steps)

    def layout(self) -> dict[str, int]:
        """See `Engine.layout`."""
        return {"ranks": 1, "zero_stage": 0}

    def state_dict(self, folder: Path | None = None) -> dict[str, Any]:
        """Master weights, buffers and the optimizer's state; nothing is written."""
        optimizer = self.optimizer.state_dict() if self.optimizer else {"state": {}, "param_groups": []}
        return {
            "weights": {name: master.data for name, master in self.masters.items()},
            "buffers": self._buffers(),
            "optimizer": {**optimizer, "state": {str(i): values for i, values in optimizer["state"].items()}},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], folder: Path | None = None) -> None:
        """See `Engine.load_state_dict`.

        Raises:
            UserError: the weights are another model's.
        """
        for name in self.masters.keys() | state["weights"].keys():
            found, own = (
                None if w is None else w.numel() for w in (state["weights"].get(name), self.masters.get(name))
            )
            if found != own:
                raise UserError(
                    f"state: parameter {name} has {found or 'no'} values there, and {own or 'none'} in this model; load the state of a run of this model"
                )
        self.write(state["weights"])
        for name, buffer in self._buffers().items():
            buffer.copy_(state["buffers"][name])
        if self.optimizer:
            by_number = {int(i): values for i, values in state["optimizer"]["state"].items()}
            with self._seen_as_float32():
                self.optimizer.load_state_dict({**state["optimizer"], "state": by_number})

    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor]) -> None:
        """Set parameters to values that master weights have had: flat or shaped, float32."""
        for name, values in weights.items():
            self.masters[name].copy_(values.view(self.masters[name].shape))
        self._refresh(weights)

    def is_finite(self) -> bool:
        """See `Engine.is_finite`."""
        return first_nonfinite((name, master.data) for name, master in self.masters.items()) is None

    def forward_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.forward_weights`: all of it."""
        return ((name, p.data) for name, p in self.model.named_parameters())

    def whole_weights(self) -> dict[str, Tensor]:
        """See `Engine.whole_weights`."""
        return self.model.state_dict()

    def leave(self) -> None:
        """There is nobody to leave."""

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
            self.masters[shard.name].grad = _summed(terms, shard).view(shard.shape).to(shard.data.dtype)
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
            with self.master_weights.wide(shard, step) as wide:
                master.data = wide.data.view(shard.shape)
                master.grad = gradients.pop(shard.name).float()
                self.optimizer.step()
                master.grad, master.data = None, narrow
            del wide  # before the next one is made

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


def device_named(name: str) -> torch.device:
    """The device that an `engine` section names; `auto`: CUDA if there is one.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"engine.device: {name!r} cannot be used: {problem}; write auto or cpu") from None


def _summed(terms: Sequence[tuple[float, Estimate]], shard: Shard) -> Tensor:
    """The sum's slice, float32. Of a gradient by itself no copy is made: clipping may change it, but nobody reads it after the step."""
    alone = len(terms) == 1 and terms[0][0] == 1.0 and isinstance(terms[0][1], Gradients)
    return terms[0][1].read(shard) if alone else WeightedSum(terms).read(shard)


@contextmanager
def _without_grad(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Nothing in `grad` at the beginning, whatever others left there, and nothing after."""
    parameters = list(parameters)
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p in parameters:
            p.grad = None
