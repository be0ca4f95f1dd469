"""The exact gradient, by backpropagation. Next: `../engines/local.py`, which applies it.

One idea: gradients are taken off the parameters and kept in the Estimate, so nothing that runs between the estimate and
its use can change or read them by accident.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.contract import Cost
from hybrid_opt.estimators.modes import requiring_grad, training_mode
from hybrid_opt.estimators.noise import Key
from hybrid_opt.objectives.contract import Objective, count_examples, count_tokens, select


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


class BackpropEstimator:
    """`g = d/dw mean(losses)`, dropout on, its randomness derived from the step's key."""

    def __init__(self, config: Backprop):
        self.config = config

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`."""
        if self.config.gradient_checkpointing and not hasattr(engine.model, "gradient_checkpointing_enable"):
            raise UserError(
                f"schedule: gradient_checkpointing: {type(engine.model).__name__} has no gradient_checkpointing_enable "
                "(Hugging Face models have); write gradient_checkpointing: false"
            )

    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: Key
    ) -> tuple[Gradients, Cost]:
        """See `Estimator.estimate`.

        Raises:
            UserError: the objective has no gradient, or none with respect to the parameters.
        """
        if not objective.differentiable:
            raise UserError(
                "objective: it has no gradient, which backprop needs; use a schedule of es estimators alone"
            )
        parameters = {name: engine.parameters[name] for name in engine.parameters if name in names}
        with (
            training_mode(engine.model, True),
            requiring_grad(engine.parameters, names),
            _seeded(key, engine.device),
            _checkpointing(engine.model, self.config.gradient_checkpointing),
            _without_grad(parameters.values()),
        ):
            loss = self._backward(engine, lambda part: objective.losses(engine.model, part), batch)
            gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        return Gradients(gradients), Cost(loss=loss, forwards=1, backwards=1, tokens=count_tokens(batch))

    def _backward(self, engine: Engine, losses_of: Callable[[Any], Tensor], batch: Any) -> float:
        """One backward pass for each part of the batch; gradients add up to that of the whole batch's mean."""
        parts, examples = self._parts(batch)
        total = 0.0
        for part in parts:
            with self._autocast(engine.device):
                losses = losses_of(part)
            loss = losses.float().sum() / (examples or len(losses))
            if not loss.requires_grad:
                raise UserError(
                    "objective: the losses do not depend on the parameters through torch operations, so there is nothing "
                    "to backpropagate; compute them with gradients enabled, or use es"
                )
            loss.backward()
            total += loss.item()
        return total

    def _parts(self, batch: Any) -> tuple[list[Any], int | None]:
        examples = count_examples(batch)
        if examples is None or self.config.accumulation == 1:
            return [batch], None
        cuts = torch.arange(examples).tensor_split(min(self.config.accumulation, examples))
        return [select(batch, cut) for cut in cuts], examples

    def _autocast(self, device: torch.device):
        if self.config.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=getattr(torch, self.config.autocast))


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


@contextmanager
def _seeded(key: Key, device: torch.device) -> Iterator[None]:
    """Dropout draws from torch's global generator: seed it from the key, and put its state back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(key.seed())
        yield


@contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    # transformers calls it activation checkpointing from 5.23 on and warns of the name that models have had before.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if not wanted or getattr(model, f"is_{name}_checkpointing", False):
        yield
        return
    enable, disable = getattr(model, f"{name}_checkpointing_enable"), getattr(model, f"{name}_checkpointing_disable")
    enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        disable()
