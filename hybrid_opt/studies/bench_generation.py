"""What writes in `hybrid-opt bench`: transformers' `generate`, and ES on a reward of what members write. Next: `mezo_loop.py`.

One idea: nothing ends a completion before its last token and its reward costs nothing, so rows differ in how they write alone.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from hybrid_opt.config.data import Data
from hybrid_opt.config.rewards import Generation
from hybrid_opt.objectives.judging import Judge
from hybrid_opt.objectives.reward import PromptExample, RewardData, RewardObjective


def without_end(model: nn.Module) -> None:
    """Let the model have no end-of-text token, and none of its makers' other wishes."""
    model.generation_config = GenerationConfig(pad_token_id=0)


def generation(model: nn.Module, prompts: Tensor, new_tokens: int) -> Callable[[], Tensor]:
    """Transformers' own greedy generation with a key-value cache: prompts (rows, tokens) -> (rows, tokens + new_tokens)."""
    mask = torch.ones_like(prompts)
    return lambda: model.generate(
        input_ids=prompts, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, use_cache=True
    )


def rewarded(prompts: Tensor, new_tokens: int) -> tuple[RewardObjective, dict[str, Any]]:
    """The objective of an ES step and its batch, for prompts (examples, tokens) after each of which so many tokens are written."""
    objective = RewardObjective([_judge()], _NoTokenizer(), Generation(max_new_tokens=new_tokens))
    data = RewardData(Data(train="random", text="text"), objective)
    return objective, data.collate([PromptExample(row, "", {}) for row in prompts.tolist()])


def begun_alike(prompts: Tensor) -> Tensor:
    """Prompts (examples, tokens) whose first three quarters are the first one's."""
    common = prompts.shape[1] * 3 // 4
    return torch.cat([prompts[:1, :common].expand(len(prompts), -1), prompts[:, common:]], dim=1)


def _judge() -> Judge:
    """Its rewards are 0, 1, 2, ...: no two are equal, so that there is something to learn and a step ends with an update."""
    rewards = itertools.count()
    return Judge("successive", lambda completions, **columns: [float(next(rewards)) for _ in completions])


class _NoTokenizer:
    """In the place of a tokenizer that knows no end of text. A model's own, which it may come without, would take a
    millisecond for some thousand tokens."""

    pad_token_id, eos_token_id = 0, None

    def batch_decode(self, tokens: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        return [" ".join(map(str, row)) for row in tokens]
