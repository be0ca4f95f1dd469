"""transformers' Trainer with a schedule: its data sets, arguments, evaluation and checkpoints, and ES steps between those of backprop.

python examples/hf_trainer.py --text my_novel.txt
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, TrainingArguments

import hybrid_opt
from hybrid_opt.config.run import Model
from hybrid_opt.integrations.transformers import HybridTrainer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", required=True, help="a text file to learn from")
parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
parser.add_argument("--schedule", default="alternate", help="a recipe, or a schedule file")
parser.add_argument("--steps", type=int, default=24)
parser.add_argument("--max-tokens", type=int, default=128)
parser.add_argument("--output", default="runs/hf_trainer")
parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
options = parser.parse_args()

model = hybrid_opt.load_model(Model(name=options.model), lora=None, seed=0)
tokenizer = hybrid_opt.load_tokenizer(Model(name=options.model))
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
ids = tokenizer(Path(options.text).read_text(encoding="utf-8"), verbose=False).input_ids
blocks = [
    {"input_ids": ids[i : i + options.max_tokens]} for i in range(0, len(ids) - options.max_tokens, options.max_tokens)
]
rows = Dataset.from_list(blocks).train_test_split(0.1, seed=0)

trainer = HybridTrainer(
    model,
    TrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-5,  # backprop's; that of ES stands in the schedule file
        eval_strategy="steps",
        eval_steps=8,
        save_steps=8,
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=rows["train"],
    eval_dataset=rows["test"].select(range(min(16, len(rows["test"])))),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
    schedule=options.schedule,
)
before = trainer.evaluate()["eval_loss"]
trainer.train(resume_from_checkpoint=options.resume)
print(f"held-out loss {before:.4f} -> {trainer.evaluate()['eval_loss']:.4f}")
trainer.save_model(f"{options.output}/model")
