"""Batches for causal language models and the logits of their last positions. Next: `causal_lm.py`, `choice.py`.

One idea: rows are padded on the left, so the tokens that matter end together, and only their logits are computed: with a
vocabulary of 49152 the last layer is a fifth of SmolLM2-135M's work.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

IGNORED = -100
"""Label of a position that is not part of the loss."""
LOSS_BLOCK = 1 << 21
"""Logits turned into losses at a time."""


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Inputs for a batch of token rows: input_ids, attention_mask and position_ids, each (rows, tokens) int64."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    # Most models count positions from the first column, padding or not; so say where each row really begins.
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def last_logits(model: nn.Module, inputs: dict[str, Tensor], keep: int, *, skip: int = 0) -> Tensor:
    """Logits (rows, keep - skip, vocabulary) of the last `keep` positions but the last `skip`, in the model's dtype."""
    takes = inspect.signature(forward_of(model)).parameters
    arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
    if "position_ids" in takes:
        arguments["position_ids"] = inputs["position_ids"]
    width = inputs["input_ids"].shape[1]
    if "logits_to_keep" in takes:
        positions = torch.arange(width - keep, width - skip, device=inputs["input_ids"].device)
        return model(**arguments, logits_to_keep=positions if skip else keep).logits
    return model(**arguments).logits[:, width - keep : width - skip]


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """`-log softmax(logits)[label]` of each position, (rows, positions) float32; 0 where the label is `IGNORED`."""
    flat, labels_flat = logits.flatten(0, 1), labels.flatten()
    carries_slope = forward_ad.unpack_dual(logits).tangent is not None
    if torch.is_grad_enabled() or carries_slope:  # neither can be written into a buffer
        return F.cross_entropy(flat.float(), labels_flat, ignore_index=IGNORED, reduction="none").view(labels.shape)
    # Some rows at a time, in one buffer: what lies between logits and losses stays in a processor's cache.
    size = max(1, LOSS_BLOCK // flat.shape[1])
    buffer = torch.empty(min(size, len(flat)), flat.shape[1], device=flat.device)
    losses = torch.empty(len(flat), device=flat.device)
    for some, label, loss in zip(flat.split(size), labels_flat.split(size), losses.split(size), strict=True):
        log_p = torch.log_softmax(some.float(), dim=-1, out=buffer[: len(some)])
        torch.gather(log_p, 1, label.clamp(min=0).unsqueeze(1), out=loss.unsqueeze(1))
    return losses.neg_().masked_fill_(labels_flat == IGNORED, 0.0).view(labels.shape)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, inside the wrapper that peft puts around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_of(model: nn.Module) -> Callable[..., Any]:
    """The forward of the model itself."""
    return unwrapped(model).forward


def pad_token(tokenizer: Any) -> int:
    """An id to fill up rows with; the attention mask hides it, so any will do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
