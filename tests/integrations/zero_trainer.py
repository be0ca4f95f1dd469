"""HybridTrainer under DeepSpeed, started by a launcher: `torchrun ... -m tests.integrations.zero_trainer FOLDER MODEL`; trains at each stage,
and once more from a checkpoint."""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from hybrid_opt.integrations.transformers import HybridTrainer
from tests.conftest import imports_are_done

ES = {
    "type": "es", "population_size": 4, "sigma": 0.02, "learning_rate": 0.05, "fitness_shaping": "none", "update": {"type": "momentum"},
}  # fmt: skip
SCHEDULE = {
    "estimators": {
        "es": ES,
        "backprop": {
            "type": "backprop",
            "learning_rate": 0.1,
            "optimizer": "SGD",
            "optimizer_arguments": {"momentum": 0.9},
        },
    },
    "policy": [{"match": "norm", "use": ["es"]}, {"match": ".*", "use": ["es", "backprop"]}],
    "schedule": {"type": "alternate", "pattern": {"es": 1, "backprop": 1}},
}


def rows(count: int = 32) -> list[dict[str, torch.Tensor]]:
    """Of 8 to 12 tokens, of which up to 6 are not to be learned."""
    generator, found = torch.Generator().manual_seed(0), []
    for i in range(count):
        ids = torch.randint(3, 64, (8 + i % 5,), generator=generator)
        labels = ids.clone()
        labels[: i % 7] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Right-padded."""
    width = max(len(example["input_ids"]) for example in examples)
    filled = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    batch = {key: torch.full((len(examples), width), fill) for key, fill in filled.items()}
    for i, example in enumerate(examples):
        for key in ("input_ids", "labels"):
            batch[key][i, : len(example[key])] = example[key]
        batch["attention_mask"][i, : len(example["input_ids"])] = 1
    return batch


def arguments(output: Path, **changes) -> TrainingArguments:
    """Steps of 8 examples of two parts, on each rank its share."""
    own = {
        "max_steps": 6, "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", "1")), "gradient_accumulation_steps": 2,
        "save_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(output), **{**own, **changes})


def main() -> None:
    folder, model = map(Path, sys.argv[1:])
    deepspeed.init_distributed(verbose=False)
    imports_are_done()
    for stage in (1, 2, 3):
        zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
        config = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": "auto"}}
        for name, checkpoint in (
            (f"zero{stage}", None),
            (f"zero{stage}-resumed", folder / f"zero{stage}/checkpoint-4"),
        ):
            args = arguments(folder / name, deepspeed=config)
            trainer = HybridTrainer(
                AutoModelForCausalLM.from_pretrained(model), args, train_dataset=rows(), eval_dataset=rows(8), data_collator=collate,
                schedule=SCHEDULE,
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            trainer.save_model(folder / name / "final")
            trainer.state.save_to_json(folder / name / f"state{args.process_index}.json")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
