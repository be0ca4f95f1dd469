"""Token by token with a key-value cache: the model writes its completions itself. Next: `prefill.py`, `choosing.py`.

One idea: rows that have come to their end leave the batch, so a pass computes what is still being written. While several
members share a pass, each keeps as many rows as the one with most to write, because hooks tell members apart by even parts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from hybrid_opt.config.rewards import Generation
from hybrid_opt.engines.contract import is_spread
from hybrid_opt.objectives.language_model import pad_token
from hybrid_opt.perturbations.factors import active_factors
from hybrid_opt.rollouts.choosing import build_choice
from hybrid_opt.rollouts.contract import Completions, end_tokens
from hybrid_opt.rollouts.prefill import Prefill, sharing

LEAVING = 1 / 8
"""Share of the rows from which on it pays to copy the others' cache."""


class Decoding:
    """Writes completions with the model's own forward passes.

    Args:
        config: how to choose tokens and when to stop.
        tokenizer: the model's.
        prefill: what reads the prompts.
    """

    def __init__(self, config: Generation, tokenizer: PreTrainedTokenizerBase, prefill: Prefill | None = None) -> None:
        self.config = config
        self.tokenizer, self.pad = tokenizer, pad_token(tokenizer)
        self.prefill = prefill or Prefill()
        self.stop_strings = StopStringCriteria(tokenizer, list(config.stop)) if config.stop else None

    @torch.no_grad()
    def complete(self, model: nn.Module, batch: dict[str, Any]) -> Completions:
        """See `Rollout.complete`."""
        ids, most = batch["input_ids"], self.config.max_new_tokens
        seeds = batch.get("seeds", torch.arange(len(ids)))
        choose = build_choice(self.config, seeds, ids.device)
        ends = torch.tensor(end_tokens(model, self.tokenizer), dtype=torch.long, device=ids.device)
        written = ids.new_full((len(ids), most), self.pad)
        lengths, finished = torch.zeros_like(ids[:, 0]), torch.zeros_like(ids[:, 0], dtype=torch.bool)
        rows = torch.arange(len(ids), device=ids.device)  # those that still take part
        together = any(is_spread(p) for p in model.parameters())
        with sharing(active_factors()) as parts:
            logits, context = self.prefill(model, ids, batch["attention_mask"], parts)
            for position in range(most):
                tokens = choose(logits, rows).where(~finished[rows], self.pad)
                written[rows, position] = tokens
                ended = torch.isin(tokens, ends) & ~finished[rows]
                lengths[rows] += ~ended & ~finished[rows]
                finished[rows] |= ended | self._stopped(written[rows, : position + 1])
                if position + 1 == most or _all(finished, together):
                    break
                if (kept := parts.shrunk(finished[rows], LEAVING)) is not None:
                    rows, tokens = rows[kept], tokens[kept]
                    context.keep(kept)
                logits = context.next(tokens)
        texts = [row[:n] for row, n in zip(written.tolist(), lengths.tolist(), strict=True)]
        return Completions(texts, finished.tolist())

    def _stopped(self, written: Tensor) -> Tensor | bool:
        return self.stop_strings(written, None) if self.stop_strings else False


def _all(finished: Tensor, together: bool) -> bool:
    """Whether every row has come to its end; where ranks run the model together, the rows of all of them."""
    left = (~finished).sum()
    if together:
        torch.distributed.all_reduce(left)
    return not left
