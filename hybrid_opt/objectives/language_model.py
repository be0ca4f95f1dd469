"""Batches for causal language models and the logits of their last positions. Next: `causal_lm.py`, `choice.py`.

One idea: rows are padded on the left, so the tokens that matter end together, and only their logits are computed: with a
vocabulary of 49152 the last layer is a fifth of SmolLM2-135M's work.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
"""Label of a position that is not part of the loss."""
LOSS_BLOCK = 1 << 22
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
    takes = inspect.signature(_forward_of(model)).parameters
    arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
    if "position_ids" in takes:
        arguments["position_ids"] = inputs["position_ids"]
    width = inputs["input_ids"].shape[1]
    if "logits_to_keep" in takes:
        positions = torch.arange(width - keep, width - skip, device=inputs["input_ids"].device)
        return model(**arguments, logits_to_keep=positions if skip else keep).logits
    return model(**arguments).logits[:, width - keep : width - skip]


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """`-log softmax(logits)[label]` of each position, (rows, positions) float32; 0 where the label is `IGNORED`.

    Some rows at a time, so that what lies between logits and losses stays in a processor's cache and out of the peak memory.
    """
    flat, labels_flat = logits.flatten(0, 1), labels.flatten()
    rows = max(1, LOSS_BLOCK // logits.shape[-1])
    losses = [
        F.cross_entropy(some.float(), some_labels, ignore_index=IGNORED, reduction="none")
        for some, some_labels in zip(flat.split(rows), labels_flat.split(rows), strict=True)
    ]
    return torch.cat(losses).view(labels.shape)


def _forward_of(model: nn.Module):
    """The forward of the model itself, inside the wrapper that peft puts around it."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).forward


def pad_token(tokenizer) -> int:
    """An id to fill up rows with; the attention mask hides it, so any will do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
