"""Long examples for one estimator, short ones for another. Next: `../config/by_length.py`, `length_threshold.py`.

One idea: who acts on what is settled by dealing examples out before the step, so estimators see batches as ever.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.config.by_length import ByLength
from hybrid_opt.errors import UserError
from hybrid_opt.objectives.batches import length_of
from hybrid_opt.objectives.contract import count_examples, select


def dealt(schedule: ByLength, batch: Any) -> dict[str, Any]:
    """A batch split by its examples' lengths, for each estimator its part; who has none is not in the answer.

    Raises:
        UserError: a batch that is not of token ids, or of which nothing is left.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise UserError(
            "schedule: by_length splits a batch by its examples' tokens, so it needs a dictionary with input_ids (and attention_mask where there is "
            "padding); or pass step() a batch for each estimator (batches)"
        )
    is_long = tokens_of(batch) > schedule.length_threshold
    sides = {schedule.short: ~is_long, **({} if schedule.skip_long else {schedule.long: is_long})}
    parts = {name: trimmed(select(batch, own.nonzero().flatten())) for name, own in sides.items() if own.any()}
    if not parts:
        raise UserError(
            f"schedule: skip_long leaves nothing of this batch: none of its {count_examples(batch)} examples has at most "
            f"{schedule.length_threshold} tokens; raise length_threshold, or pass batches of shorter ones"
        )
    return parts


def tokens_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Tokens of each example without padding, (examples,) int64; of one with several rows those of the longest."""
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    return mask.sum(dim=-1).flatten(1).amax(dim=1) if mask.dim() > 2 else mask.sum(dim=-1)


def trimmed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without the columns at its ends that are padding in all rows."""
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    used = mask.flatten(0, -2).any(dim=0).nonzero()
    first, end = used.min().item(), used.max().item() + 1
    return {
        key: value[..., first:end] if isinstance(value, Tensor) and value.shape == mask.shape else value
        for key, value in batch.items()
    }


def by_length(schedule: ByLength, examples: Sequence[Any]) -> dict[str, list[Any]]:
    """The examples of each estimator that acts.

    Raises:
        UserError: one of them would have none.
    """
    sides = {
        schedule.long: [e for e in examples if length_of(e) > schedule.length_threshold],
        schedule.short: [e for e in examples if length_of(e) <= schedule.length_threshold],
    }
    lengths, threshold = sorted(map(length_of, examples)), schedule.length_threshold
    for name in schedule.weights:
        if not sides[name]:
            what = f"more than {threshold}" if name == schedule.long else f"{threshold} tokens or less"
            raise UserError(
                f"schedule.length_threshold: no training example has {what}, so {name!r} would have nothing to do; they have {lengths[0]} to "
                f"{lengths[-1]}, half of them at most {lengths[len(lengths) // 2]}"
            )
    return {name: sides[name] for name in schedule.weights}
