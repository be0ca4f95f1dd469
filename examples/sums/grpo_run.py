"""The run itself, inside TRL's environment: supervised steps, GRPO until the seconds are spent, one JSON file.

One idea: training time is what both methods are given alike, so a callback ends GRPO by the clock, and evaluation stands outside.
"""

import json
import os
import time
import warnings
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from sums import TEST, TRAIN, exact_match, read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer
from warm_up import MAX_NEW_TOKENS, WarmUp, greedy_exact_match, stop_tokens, warmed_up

from hybrid_opt.machine.memory import forget_peak, peak_memory_bytes

ENDLESS = 10**6
"""Steps; the clock ends a run, never their number."""


class Clock(TrainerCallback):
    """Stops training when `seconds` are spent; keeps (seconds, mean reward) of each step, and says it."""

    def __init__(self, seconds: float):
        self.seconds, self.spent, self.begun = seconds, 0.0, 0.0
        self.rewards: list[tuple[float, float]] = []

    def on_train_begin(self, args, state, control, **rest):
        """Start."""
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **rest):
        """A step is whole: generation, reward, gradients, update."""
        self.spent = time.perf_counter() - self.begun
        control.should_training_stop = self.spent >= self.seconds

    def on_log(self, args, state, control, logs=None, **rest):
        """After each step, by `logging_steps=1`."""
        if "reward" in logs:
            self.rewards.append((round(self.spent, 2), logs["reward"]))
            print(f"step {state.global_step:4}  {self.spent:6.1f} s  reward {logs['reward']:.3f}", flush=True)


class CountedReward:
    """Exact match that counts the completions it was shown."""

    __name__ = "exact_match"

    def __init__(self):
        self.completions = 0

    def __call__(self, prompts, completions, answer, **columns) -> list[float]:
        self.completions += len(completions)
        return exact_match(prompts, completions, answer)


def grpo_config(options: Namespace) -> GRPOConfig:
    """TRL's configuration: float32, no checkpoints, no reports, a constant learning rate."""
    return GRPOConfig(
        output_dir=str(options.output),
        max_steps=ENDLESS,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        num_generations=options.num_generations,
        num_iterations=options.num_iterations,
        max_completion_length=MAX_NEW_TOKENS,
        temperature=options.temperature,
        beta=options.beta,
        loss_type=options.loss_type,
        scale_rewards=options.scale_rewards,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=options.max_grad_norm,
        gradient_checkpointing=options.gradient_checkpointing,
        bf16=options.bf16,  # TRL's own default is True
        use_cpu=not torch.cuda.is_available(),  # without it bf16 is refused there
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        seed=options.seed,
    )


def adapters(options: Namespace) -> LoraConfig | None:
    """LoRA on every linear layer but the head, or None for all weights."""
    if not options.lora:
        return None
    rank = options.lora_rank
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def trained_by_grpo(model, tokenizer, rows: list[dict], options: Namespace, seconds: float):
    """GRPO on `rows` for so many seconds: the trainer, its clock, its reward."""
    clock, reward = Clock(seconds), CountedReward()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=grpo_config(options),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]),
        processing_class=tokenizer,
        peft_config=adapters(options),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    if seconds > 0:
        trainer.train()
    return trainer, clock, reward


class Measured:
    """Greedy exact match on held-out and on training rows, said and kept under the moment's name."""

    def __init__(self, tokenizer):
        self.tokenizer, self.stops = tokenizer, stop_tokens(tokenizer)
        self.sets = {"held_out": read_rows(TEST), "training": read_rows(TRAIN)}
        self.found: dict[str, dict[str, float]] = {}

    def at(self, moment: str, model) -> None:
        """Measure; the model is left in evaluation mode."""
        shares = {name: greedy_exact_match(model, self.tokenizer, rows, self.stops) for name, rows in self.sets.items()}
        print(f"{moment}: exact match {shares['held_out']:.3f}, on training rows {shares['training']:.3f}", flush=True)
        self.found[moment] = shares


def run(options: Namespace) -> None:
    """All of it; writes `result.json` into the output folder and prints what it begins with."""
    _quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    measured, rows = Measured(tokenizer), read_rows(TRAIN)

    measured.at("before", model)
    plan = WarmUp(options.warm_up_steps, options.warm_up_batch_size, options.warm_up_learning_rate, options.seed)
    model, warm_up = warmed_up(model, tokenizer, rows, plan, options.warm_up_cache)
    measured.at("after_warm_up", model)

    model.generation_config.eos_token_id = measured.stops  # TRL ends a completion at any of these
    forget_peak(model.device)
    trainer, clock, reward = trained_by_grpo(model, tokenizer, rows, options, options.seconds - warm_up.seconds)
    peak = peak_memory_bytes(model.device)
    measured.at("after_grpo", trainer.model)

    result = {
        "exact_match": measured.found,
        "seconds": {"warm_up": warm_up.seconds, "grpo": clock.spent, "all": warm_up.seconds + clock.spent},
        "steps": {"warm_up": warm_up.steps, "grpo": trainer.state.global_step},
        "completions": reward.completions,
        "peak_memory_bytes": {"warm_up": warm_up.peak_memory_bytes, "grpo": peak},
    }
    print(json.dumps(result, indent=2))
    _write(options.output / "result.json", json.dumps(result | _circumstances(options, clock), indent=2) + "\n")


def _circumstances(options: Namespace, clock: Clock) -> dict:
    return {
        "rewards": clock.rewards,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }


def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # TRL passes on options whose names transformers calls old


def _write(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)  # a result is there whole, or not at all
