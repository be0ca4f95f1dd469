"""What a rollout is: rows of prompts in, completions out. Next: `decoding.py`.

One idea: who writes does not matter to who judges. A rollout is called with the rows of all members that share a forward
pass; the model's own hooks make each row its member's, and an engine of its own asks `active_factors()` for the members.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completions:
    """What was written after each row's prompt."""

    tokens: Sequence[Sequence[int]]
    """Token ids of each row, without the end-of-text token."""
    finished: Sequence[bool]
    """Whether a row came to an end of its own: the end-of-text token or a stop string, rather than the most tokens."""


class Rollout(Protocol):
    """Writes completions."""

    def complete(self, model: nn.Module, batch: dict[str, Any]) -> Completions:
        """Completions of the rows' prompts, in their order.

        Args:
            batch: input_ids and attention_mask (rows, tokens) int64, padded on the left; while `active_factors()` is there,
                member-major: as many rows for each member. With `seeds` (rows,) int64, a row's random numbers follow from
                its seed alone, whatever other rows there are; without, from its place.
        """
        ...


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-text token, and those at which the model's makers say that it stops (a chat's end of turn)."""
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])}
    return sorted(ends - {None})
