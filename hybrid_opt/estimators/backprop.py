"""The exact gradient, by backpropagation. Next: `../engines/local.py`, which applies it.

One idea: the estimator only says how the loss of its examples is computed, in parts. Where the gradients of the parts add
up, and over which processes, is the engine's affair.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.engines.contract import Engine
from hybrid_opt.engines.ranks import Ranks
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.contract import Cost, Estimate
from hybrid_opt.estimators.modes import training_mode
from hybrid_opt.noise.keys import Key, StepKey
from hybrid_opt.objectives.contract import Objective, count_examples, count_tokens, select

BACKWARD, CHECKPOINTED_BACKWARD = 2.0, 3.0
"""Forward passes that take as much computing as a backward pass, and as one that repeats the forward pass on its way."""


class BackpropEstimator:
    """`g = d/dw mean(losses)`, dropout on, its randomness derived from the step's key."""

    def __init__(self, config: Backprop) -> None:
        self.config = config

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Estimator.check`."""
        if self.config.gradient_checkpointing and not can_checkpoint(engine.model):
            raise UserError(
                f"schedule: gradient_checkpointing: {type(engine.model).__name__} has no gradient_checkpointing_enable "
                "(Hugging Face models have); write gradient_checkpointing: false"
            )

    def estimate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], key: StepKey
    ) -> tuple[Estimate, Cost]:
        """See `Estimator.estimate`.

        Raises:
            UserError: the objective has no gradient, or none with respect to the parameters.
        """
        if not objective.differentiable:
            raise UserError(
                "objective: it has no gradient, which backprop needs; use a schedule of es estimators alone"
            )
        with (
            training_mode(engine.model, True),
            _seeded(key, engine.ranks.rank, engine.device),
            checkpointing(engine.model, self.config.gradient_checkpointing),
        ):
            gradient, loss = engine.gradients(self._losses(engine, objective, batch), names)
        recomputes = self.config.gradient_checkpointing or _is_checkpointing(engine.model)
        equivalents = 1.0 + (CHECKPOINTED_BACKWARD if recomputes else BACKWARD)
        cost = Cost(loss=loss, forwards=1, backwards=1, forward_equivalents=equivalents, tokens=count_tokens(batch))
        return gradient, cost

    def _losses(self, engine: Engine, objective: Objective, batch: Any) -> list[Callable[[], Tensor]]:
        """What this rank computes: for each part of its share of the batch, the part's share of the whole batch's mean."""

        def loss_of(part: Any, examples: int | None, empty: bool) -> Tensor:
            with self._autocast(engine.device):
                losses = objective.losses(engine.model, part)
            loss = losses.float().sum() / (examples or len(losses) * engine.ranks.world_size)
            if not loss.requires_grad:
                raise UserError(
                    "objective: the losses do not depend on the parameters through torch operations, so there is nothing "
                    "to backpropagate; compute them with gradients enabled, or use es"
                )
            return loss * 0.0 if empty else loss

        return [partial(loss_of, *part) for part in self._parts(batch, engine.ranks)]

    def _parts(self, batch: Any, ranks: Ranks) -> list[tuple[Any, int | None, bool]]:
        """This rank's examples in as many parts as every rank has, the number of all ranks' examples, and whether it is an empty
        part: one that only keeps step with the other ranks' passes through the model, and counts for nothing."""
        examples = count_examples(batch)
        if examples is None:
            return [(batch, None, False)]
        most = -(-examples // ranks.world_size)
        parts = min(self.config.accumulation, most)
        if self.config.micro_batch_size is not None:
            parts = -(-most // self.config.micro_batch_size)
        if parts == ranks.world_size == 1:
            return [(batch, None, False)]
        cuts = torch.arange(examples).tensor_split(ranks.world_size)[ranks.rank].tensor_split(parts)
        first = torch.zeros(1, dtype=torch.int64)
        return [(select(batch, cut if len(cut) else first), examples, not len(cut)) for cut in cuts]

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.config.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=getattr(torch, self.config.autocast))


def can_checkpoint(model: nn.Module) -> bool:
    """Whether a model can recompute activations in the backward pass."""
    return hasattr(model, "gradient_checkpointing_enable")


@contextmanager
def _seeded(key: Key, rank: int, device: torch.device) -> Iterator[None]:
    """Dropout draws from torch's global generator: seed it from the key, on each rank another way, and put its state back."""
    key = key.fold(rank) if rank else key
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(key.seed())
        yield


@contextmanager
def checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, backward passes recompute activations, if that is wanted."""
    if not wanted or _is_checkpointing(model):
        yield
        return
    name = _checkpointing_name(model)
    enable, disable = getattr(model, f"{name}_checkpointing_enable"), getattr(model, f"{name}_checkpointing_disable")
    has_hooks = bool(getattr(model, "_require_grads_hooks", None))
    enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    if not has_hooks and hasattr(model, "disable_input_require_grads"):
        # transformers lets the embeddings' output require a gradient, which only reentrant checkpointing needs: all layers below the lowest
        # that backprop owns would be gone through for nothing, and in later steps without checkpointing too.
        model.disable_input_require_grads()
    try:
        yield
    finally:
        disable()


def _is_checkpointing(model: nn.Module) -> bool:
    return bool(getattr(model, f"is_{_checkpointing_name(model)}_checkpointing", False))


def _checkpointing_name(model: nn.Module) -> str:
    """transformers calls it activation checkpointing from 5.23 on and warns of the name that models have had before."""
    return "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
