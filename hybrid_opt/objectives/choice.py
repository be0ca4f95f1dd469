"""Choosing one of a few completions: classification by label words. Next: `batches.py`.

One idea: the log-probabilities of a choice's tokens can all be read off one row, the prompt with all but the choice's
last token. Choices that begin alike share that row, so one-token label words cost one row an example.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from hybrid_opt.config.data import Data
from hybrid_opt.errors import UserError, did_you_mean
from hybrid_opt.objectives.examples import encode_prompts, tokenize
from hybrid_opt.objectives.language_model import last_logits, left_padded, pad_token
from hybrid_opt.objectives.template import Template


@dataclass(frozen=True)
class ChoiceExample:
    """A prompt and the number of the right choice."""

    prompt: Sequence[int]
    label: int


class ChoiceObjective:
    """`-log softmax_c(s)[label]` with `s_c = sum_t log p(token_t of choice c | prompt, tokens before)`.

    Args:
        choices: token ids of each choice, at least one token each.
    """

    differentiable = True

    def __init__(self, choices: Sequence[Sequence[int]]) -> None:
        self.choices = [tuple(choice) for choice in choices]
        self.prefixes = list(dict.fromkeys(choice[:-1] for choice in self.choices))
        self.keep = max(len(choice) for choice in self.choices)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """See `Objective.losses`: (examples,) float32."""
        return F.cross_entropy(self.scores(model, batch), batch["labels"], reduction="none")

    def measures(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses, and whether the likeliest choice is the right one."""
        scores = self.scores(model, batch)
        return {
            "loss": F.cross_entropy(scores, batch["labels"], reduction="none"),
            "accuracy": (scores.argmax(1) == batch["labels"]).float(),
        }

    def scores(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Log-probability of each choice as a whole: (examples, choices) float32."""
        rows = {key: batch[key].flatten(0, 1) for key in ("input_ids", "attention_mask", "position_ids")}
        log_p = F.log_softmax(last_logits(model, rows, self.keep).float(), dim=-1)
        log_p = log_p.view(len(batch["labels"]), len(self.prefixes), self.keep, -1)
        return torch.stack([self._score(log_p, choice) for choice in self.choices], dim=1)

    def _score(self, log_p: Tensor, choice: tuple[int, ...]) -> Tensor:
        row, k = self.prefixes.index(choice[:-1]), len(choice)
        positions = torch.arange(self.keep - k, self.keep, device=log_p.device)
        return log_p[:, row, positions, torch.tensor(choice, device=log_p.device)].sum(-1)


class ChoiceData:
    """Makes batches for `ChoiceObjective` from rows.

    Raises:
        UserError: a choice that gives no token.
    """

    def __init__(self, config: Data, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer
        tokens = tokenize(config.choices, tokenizer, special_tokens=False)
        for text, choice in zip(config.choices, tokens, strict=True):
            if not choice:
                raise UserError(f"data.choices: {text!r} gives no token")
        self.objective = ChoiceObjective(tokens)

    def encode(self, rows: Dataset) -> list[ChoiceExample]:
        """Examples from rows.

        Raises:
            UserError: a completion that is none of the choices; see `encode_prompts` for others.
        """
        completion = Template.parse(self.config.completion, "data.completion")
        completion.check(rows.column_names)
        labels = [self._label(completion.render(completion.values(row, i)), i) for i, row in enumerate(rows)]
        room = self.config.max_tokens - self.objective.keep
        prompts = encode_prompts(rows, self.config, self.tokenizer, [room] * len(rows))
        return [ChoiceExample(*pair) for pair in zip(prompts, labels, strict=True)]

    def _label(self, text: str, row: int) -> int:
        if text not in self.config.choices:
            raise UserError(
                f"data.completion: row {row} gives {text!r}, which is none of data.choices "
                f"{list(self.config.choices)}{did_you_mean(text, self.config.choices)}"
            )
        return self.config.choices.index(text)

    def collate(self, examples: Sequence[ChoiceExample]) -> dict[str, Tensor]:
        """input_ids, attention_mask, position_ids (examples, prefixes, tokens) and labels (examples,)."""
        prefixes = self.objective.prefixes
        rows = left_padded([[*e.prompt, *prefix] for e in examples for prefix in prefixes], pad_token(self.tokenizer))
        batch = {key: value.view(len(examples), len(prefixes), -1) for key, value in rows.items()}
        batch["labels"] = torch.tensor([e.label for e in examples])
        return batch
