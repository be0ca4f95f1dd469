"""The batch of a whole step from the parts in which transformers deals it out. Next: `transformers.py`.

One idea: transformers cuts a step's batch by ranks and by gradient accumulation, each part padded to its own longest row. hybrid_opt cuts it by
estimators, so it wants the whole one, the same on all ranks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional as F

from hybrid_opt.errors import UserError
from hybrid_opt.objectives.contract import map_tensors
from hybrid_opt.objectives.language_model import IGNORED


def everybodys(parts: Sequence[Mapping[str, Any]], world_size: int) -> list[Mapping[str, Any]]:
    """The parts of all ranks, in their order; all ranks together."""
    if world_size == 1:
        return list(parts)
    return gather_object([map_tensors(lambda t: t.cpu(), dict(part)) for part in parts])


def joined(parts: Sequence[Mapping[str, Any]], pad: int = 0) -> dict[str, Any]:
    """One batch of all the parts' examples. Narrower rows are filled up on the right: tokens with `pad`, labels with -100, anything else with 0;
    and an attention mask hides that, where there was none.

    Raises:
        UserError: the parts do not have the same keys, or tensors that cannot stand beside each other, or rows that hold several examples.
    """
    keys = list(parts[0])
    if packed := next((key for key in keys if key.startswith("cu_seq_lens")), None):
        raise UserError(
            f"data_collator: batches with {packed} hold several examples in a row, which ES members cannot be told apart by; write "
            "packing=False and padding_free=False"
        )
    for part in parts:
        if list(part) != keys:
            raise UserError(
                f"data_collator: batches of one step differ in their keys, {keys} and {list(part)}; collate all examples alike"
            )
    if len(parts) == 1:
        return dict(parts[0])
    rows = [part.get("input_ids") for part in parts]
    if (
        "attention_mask" not in keys
        and len({row.shape[1] for row in rows if isinstance(row, Tensor) and row.dim() == 2}) > 1
    ):
        parts = [{**part, "attention_mask": torch.ones_like(row)} for part, row in zip(parts, rows, strict=True)]
    fills = {"input_ids": pad, "labels": IGNORED}
    return {key: _joined(key, [part[key] for part in parts], fills.get(key, 0)) for key in parts[0]}


def _joined(key: str, values: Sequence[Any], fill: int) -> Any:
    if all(isinstance(value, list) for value in values):
        return [item for value in values for item in value]
    if not all(isinstance(value, Tensor) and value.dim() for value in values):
        return values[0]
    if values[0].dim() > 1:
        width = max(value.shape[1] for value in values)
        values = [_widened(value, width, fill) for value in values]
    try:
        return torch.cat(list(values))
    except RuntimeError as error:
        raise UserError(
            f"data_collator: {key} has shapes {', '.join(str(tuple(v.shape)) for v in values)} in the batches of one step, which cannot "
            "be joined; pad to one size, or write gradient_accumulation_steps=1"
        ) from error


def _widened(value: Tensor, width: int, fill: int) -> Tensor:
    """(examples, tokens, ...) with so many tokens."""
    missing = width - value.shape[1]
    return F.pad(value, (0, 0) * (value.dim() - 2) + (0, missing), value=fill) if missing else value
