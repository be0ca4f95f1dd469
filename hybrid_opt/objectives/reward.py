"""Rewards of what a model writes: prompts -> completions -> judges. Next: `../rollouts/contract.py`, `judging.py`.

One idea: a reward is minimised as its negative, and this is the one place where it changes its sign.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hybrid_opt.config.data import Data
from hybrid_opt.config.rewards import FUNCTION, Generation, Reward, RewardFunction
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.fitness import worst_for_missing
from hybrid_opt.noise.keys import Key
from hybrid_opt.objectives.contract import import_function
from hybrid_opt.objectives.examples import encode_questions
from hybrid_opt.objectives.judging import COMPLETED, Judge, Judges, RewardCall, Verdict
from hybrid_opt.objectives.language_model import left_padded, pad_token
from hybrid_opt.rollouts.contract import Completions, Rollout
from hybrid_opt.rollouts.decoding import Decoding
from hybrid_opt.rollouts.prefill import Prefill, cache_bytes
from hybrid_opt.rollouts.vllm import VllmRollout
from hybrid_opt.tasks.scorers import needed_columns, scorer


class RewardObjective:
    """`-sum_j weight_j reward_j(prompt, completion)` of each example.

    A completion that nobody could judge has the loss NaN; the estimator takes the worst of the step for it (`on_error: worst`).

    Args:
        rewards: functions with TRL's signature, or Judges of them, which have weights.
        tokenizer: the model's.
        generation: how completions are written.
        on_error: what a reward is that is not finite, missing, late or raised: `worst` of the step, `zero`, or `stop`: an error.
        timeout: most seconds for one call of a function.
        rollout: what writes completions; None: the model itself.
    """

    differentiable = False
    row_elements = 1

    def __init__(
        self,
        rewards: Sequence[Judge | RewardCall],
        tokenizer: PreTrainedTokenizerBase,
        generation: Generation = Generation(),
        *,
        on_error: str = "worst",
        timeout: float = 60.0,
        rollout: Rollout | None = None,
    ) -> None:
        judges = [r if isinstance(r, Judge) else Judge(getattr(r, "__name__", type(r).__name__), r) for r in rewards]
        self.judges, self.tokenizer, self.generation = Judges(judges, on_error, timeout), tokenizer, generation
        self.rollout = rollout or Decoding(generation, tokenizer)
        self.tally = Tally()

    def losses(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """See `Objective.losses`: (examples,) float32, NaN where there is no reward."""
        verdict, completions = self._judged(model, batch)
        self.tally.add(verdict, completions)
        return -torch.tensor(verdict.totals, device=batch["input_ids"].device)

    def measures(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses and rewards; each function's own rewards if there are several; the share of completions that ended by themselves.

        A missing reward counts as the worst of the batch.
        """
        verdict, completions = self._judged(model, batch)
        losses = -torch.tensor(verdict.totals)
        total = worst_for_missing(losses, losses.isnan())
        own = verdict.rewards if len(verdict.rewards) > 1 else {}
        return {
            "loss": total,
            "reward": -total,
            **{name: torch.tensor(values).nan_to_num(0.0) for name, values in own.items()},
            "finished": torch.tensor(completions.finished).float(),
        }

    def seeded(self, batch: dict[str, Any], key: Key) -> dict[str, Any]:
        """See `Generates.seeded`: with `seeds` (examples,) int64."""
        seeds = [key.fold(i).seed() for i in range(len(batch["input_ids"]))]
        return {**batch, "seeds": torch.tensor(seeds)}

    def row_bytes(self, model: nn.Module, batch: dict[str, Any]) -> int:
        """See `Generates.row_bytes`: a row's keys and values, when it is at its longest."""
        if not isinstance(self.rollout, Decoding):
            return 0
        return cache_bytes(model, batch["input_ids"].shape[1] + self.generation.max_new_tokens)

    def rehearsal(self) -> "_OnePass":
        """See `Generates.rehearsal`: two tokens."""
        config = self.generation.model_copy(update={"max_new_tokens": 2, "stop": ()})
        return _OnePass(Decoding(config, self.tokenizer, Prefill(beginnings=False)))

    def _judged(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Verdict, Completions]:
        completions = self.rollout.complete(model, batch)
        texts = [self._cut(text) for text in self.tokenizer.batch_decode(completions.tokens, skip_special_tokens=True)]
        # As TRL hands them over: a conversation is answered by a message.
        answers = [
            [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
            for prompt, text in zip(batch["prompts"], texts, strict=True)
        ]
        verdict = self.judges.judge(batch["prompts"], answers, completions.tokens, batch["columns"])
        return verdict, completions

    def _cut(self, text: str) -> str:
        """What comes before the first stop string."""
        return text[: min((at for stop in self.generation.stop if (at := text.find(stop)) >= 0), default=len(text))]


class Tally:
    """Sums and counts of what was seen of completions, evaluations left out, since somebody last asked."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[float, int]] = {}

    def add(self, verdict: Verdict, completions: Completions) -> None:
        """Count some more."""
        self._add("completion_tokens", map(len, completions.tokens))
        self._add("finished", completions.finished)
        self._add("reward_errors", [verdict.errors])
        for name, rewards in verdict.rewards.items() if len(verdict.rewards) > 1 else ():
            self._add(name, (reward for reward in rewards if not math.isnan(reward)))

    def take(self) -> dict[str, tuple[float, int]]:
        """Name -> sum and count, from now on anew; the names are always the same."""
        seen, self.seen = self.seen, dict.fromkeys(self.seen, (0.0, 0))
        return seen

    def _add(self, name: str, values: Iterable[float]) -> None:
        values = list(values)
        total, count = self.seen.get(name, (0.0, 0))
        self.seen[name] = (total + sum(values), count + len(values))


class _OnePass:
    """Generates as the objective does, and has no losses."""

    differentiable = False

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    def losses(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        self.rollout.complete(model, batch)
        return torch.zeros(len(batch["input_ids"]))


@dataclass(frozen=True)
class PromptExample:
    """A prompt, as the model and as the judges get it, with the row that it comes from."""

    prompt: Sequence[int]
    """Token ids."""
    shown: str | list[dict[str, str]]
    """The prompt as a text, or as a conversation's messages."""
    row: dict[str, Any]
    """Every column, for the reward functions."""


class RewardData:
    """Makes batches for `RewardObjective` from rows.

    Args:
        config: the `data` section; `max_tokens` holds the prompt and the most tokens of a completion.
    """

    def __init__(self, config: Data, objective: RewardObjective) -> None:
        self.config, self.tokenizer, self.judges = config, objective.tokenizer, objective.judges
        self.room = config.max_tokens - objective.generation.max_new_tokens

    def encode(self, rows: Dataset) -> list[PromptExample]:
        """Examples from rows.

        Raises:
            UserError: no room is left for prompts, a reward function needs a column that is not there; see `encode_prompts`.
        """
        if self.room < 1:
            raise UserError(
                f"data.max_tokens: {self.config.max_tokens} tokens leave none for a prompt beside a completion of "
                f"{self.config.max_tokens - self.room} (generation.max_new_tokens); raise it"
            )
        self.judges.check(rows.column_names)
        prompts, shown = encode_questions(rows, self.config, self.tokenizer, self.room)
        return [PromptExample(*parts) for parts in zip(prompts, shown, rows, strict=True)]

    def collate(self, examples: Sequence[PromptExample]) -> dict[str, Any]:
        """input_ids, attention_mask, position_ids (examples, tokens), and as lists the prompts and all columns."""
        names = [name for name in examples[0].row if name not in ("prompt", "completion", *COMPLETED)]
        return {
            **left_padded([e.prompt for e in examples], pad_token(self.tokenizer)),
            "prompts": [e.shown for e in examples],
            "columns": {name: [e.row[name] for e in examples] for name in names},
        }


def reward_objective(
    config: Reward, data: Data, tokenizer: PreTrainedTokenizerBase
) -> tuple[RewardObjective, RewardData]:
    """The objective that a run file describes, and what makes its batches.

    Raises:
        UserError: a reward function cannot be found.
    """
    rewards = [judge_of(judge, f"objective.rewards.{i}") for i, judge in enumerate(config.rewards)]
    rollout = VllmRollout(config.generation, tokenizer) if config.generation.engine == "vllm" else None
    objective = RewardObjective(
        rewards, tokenizer, config.generation, on_error=config.on_error, timeout=config.timeout, rollout=rollout
    )
    return objective, RewardData(data, objective)


def judge_of(config: RewardFunction, key: str) -> Judge:
    """The reward function that a run file names at a key."""
    if not FUNCTION.fullmatch(config.function):
        needs = needed_columns(config.function, config.arguments, key)
        return Judge(config.function, scorer(config.function, config.arguments, key), config.weight, needs)
    function = import_function(config.function, key)
    return Judge(
        config.function, partial(function, **config.arguments) if config.arguments else function, config.weight
    )
