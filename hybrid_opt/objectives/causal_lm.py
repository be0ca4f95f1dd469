"""Causal language modelling: learn to write the completion. Next: `choice.py`."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hybrid_opt.config.data import Data
from hybrid_opt.objectives.examples import Example, encode_examples
from hybrid_opt.objectives.language_model import IGNORED, cross_entropies, last_logits, left_padded, pad_token


class CausalLmObjective:
    """Mean cross-entropy of an example's completion tokens, `-1/T sum_t log p(token_t | tokens before)`."""

    differentiable = True

    def losses(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """See `Objective.losses`: (examples,) float32."""
        keep = batch["logits_to_keep"]
        losses = cross_entropies(last_logits(model, batch, keep, skip=1), batch["labels"][:, -keep + 1 :])
        return losses.sum(1) / self.tokens(batch)

    @staticmethod
    def tokens(batch: dict[str, Any]) -> Tensor:
        """T, the tokens that each example's loss is a mean over: (examples,) int64."""
        return (batch["labels"][:, -batch["logits_to_keep"] + 1 :] != IGNORED).sum(1)

    def measures(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The losses."""
        return {"loss": self.losses(model, batch)}


class CausalLmData:
    """Makes batches for `CausalLmObjective` from rows."""

    def __init__(self, config: Data, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer

    def encode(self, rows: Dataset) -> list[Example]:
        """Examples from rows; see `encode_examples` for errors."""
        return encode_examples(rows, self.config, self.tokenizer)

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """input_ids, attention_mask, position_ids, labels (examples, tokens), and how many last logits are needed."""
        batch: dict[str, Any] = left_padded([[*e.prompt, *e.completion] for e in examples], pad_token(self.tokenizer))
        batch["labels"] = left_padded([[IGNORED] * len(e.prompt) + list(e.completion) for e in examples], IGNORED)[
            "input_ids"
        ]
        # A completion of k tokens is predicted from the k positions before its last; a row's first token from nothing.
        width = batch["input_ids"].shape[1]
        batch["logits_to_keep"] = min(width, max(len(e.completion) for e in examples) + 1)
        return batch
