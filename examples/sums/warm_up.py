"""Supervised steps on the answers, and greedy exact match: what every method here begins and ends with. Next: `grpo_run.py`.

One idea: a few steps teach the format, so that a reward is not zero everywhere; their seconds are part of the budget.
"""

import hashlib
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from sums import STOP, exact_match
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hybrid_opt.machine.memory import forget_peak, peak_memory_bytes

IGNORED = -100
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class WarmUp:
    """What the supervised steps were, and what they took."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    seconds: float = 0.0
    peak_memory_bytes: int = 0


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: the end of sequence, and every token whose text has a newline in it (129 in SmolLM2).

    A list of ids is the one form of a stop that both `generate` and TRL's mask of a completion go by."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return sorted({tokenizer.eos_token_id, *(i for i, text in enumerate(texts) if STOP in text)})


def supervised_batch(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels: (rows, tokens) int64, padded on the left, labels on completions alone."""
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
    answers = [tokenizer(row["completion"], add_special_tokens=False).input_ids for row in rows]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids, mask, labels = [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        left = width - len(prompt) - len(answer)
        ids.append([tokenizer.pad_token_id] * left + prompt + answer)
        mask.append([0] * left + [1] * (width - left))
        labels.append([IGNORED] * (width - len(answer)) + answer)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def supervised_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`mean_row -1/T sum_t log p(token_t | tokens before)` over completion tokens; () float32."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return (losses.sum(1) / (labels != IGNORED).sum(1)).mean()


def shuffled_batches(rows: list[dict], size: int, seed: int):
    """Without end: rows in a new order each time all have been seen; a batch is never short."""
    order, generator = [], random.Random(seed)
    while True:
        while len(order) < size:
            order += generator.sample(rows, len(rows))
        yield order[:size]
        order = order[size:]


def supervised_steps(model: PreTrainedModel, tokenizer, rows: list[dict], plan: WarmUp) -> WarmUp:
    """AdamW steps on `rows` in place, gradients clipped to norm 1; the plan, with seconds and peak memory in bytes."""
    forget_peak(model.device)
    begun = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=0.0)
    for _, batch in zip(range(plan.steps), shuffled_batches(rows, plan.batch_size, plan.seed), strict=False):
        batch = {name: tensor.to(model.device) for name, tensor in supervised_batch(batch, tokenizer).items()}
        supervised_loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    taken = {"seconds": time.perf_counter() - begun, "peak_memory_bytes": peak_memory_bytes(model.device)}
    return WarmUp(**{**asdict(plan), **taken})


def warmed_up(model: PreTrainedModel, tokenizer, rows: list[dict], plan: WarmUp, cache: Path | None):
    """The model after the supervised steps, and what they took; both from `cache` if it holds the same steps."""
    if not plan.steps:
        return model, plan
    if cache is None:
        return model, supervised_steps(model, tokenizer, rows, plan)
    same = f"{model.name_or_path} {plan} {rows}"
    folder = cache / hashlib.sha256(same.encode()).hexdigest()[:16]
    if (folder / "warm_up.json").exists():
        kept = json.loads((folder / "warm_up.json").read_text(encoding="utf-8"))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device), WarmUp(**kept)
    taken = supervised_steps(model, tokenizer, rows, plan)
    model.save_pretrained(folder)
    (folder / "warm_up.json").write_text(json.dumps(asdict(taken)) + "\n", encoding="utf-8")
    return model, taken


@torch.no_grad()
def greedy_exact_match(model: PreTrainedModel, tokenizer, rows: list[dict], stops: list[int]) -> float:
    """Share of rows whose greedy completion of at most 8 tokens is the answer."""
    model.eval()
    inputs = tokenizer([row["prompt"] for row in rows], padding=True, padding_side="left", return_tensors="pt")
    tokens = model.generate(
        **inputs.to(model.device), do_sample=False, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=stops
    )[:, inputs.input_ids.shape[1] :]
    completions = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    rewards = exact_match([row["prompt"] for row in rows], completions, [row["answer"] for row in rows])
    return sum(rewards) / len(rewards)
