"""A reward function of TRL's kind, from Python: ES maximises it without a gradient, on completions that all members write side by side.

    python examples/reward.py --text my_novel.txt

The reward is that of a style: short words. `anchor` pulls the weights back to where they were, so that the model keeps its English.
"""

import argparse
from pathlib import Path

from datasets import Dataset

import hybrid_opt
from hybrid_opt.config.run import Model
from hybrid_opt.objectives.batches import ShuffledBatches

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", required=True, help="a text file whose lines begin the completions")
parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="runs/reward")
options = parser.parse_args()

model = hybrid_opt.load_model(Model(name=options.model), lora=None, seed=0)
tokenizer = hybrid_opt.load_tokenizer(Model(name=options.model))


def short_words(prompts, completions, **columns):
    """Minus the mean length of a completion's words; nothing to say of one without words."""
    words = [completion.split() for completion in completions]
    return [-sum(map(len, some)) / len(some) if some else None for some in words]


lines = [line for line in Path(options.text).read_text(encoding="utf-8").splitlines() if len(line) > 40]
rows = Dataset.from_list([{"start": " ".join(line.split()[:5])} for line in lines[:128]])
objective = hybrid_opt.RewardObjective(
    [short_words], tokenizer, hybrid_opt.Generation(max_new_tokens=16, temperature=0.7), timeout=10
)
data = hybrid_opt.RewardData(hybrid_opt.Data(train="rows above", prompt="{start}", max_tokens=64), objective)
examples = data.encode(rows)

schedule = {
    "estimators": {
        "es": {
            "type": "es",
            "population_size": 16,
            "sigma": 1e-2,
            "learning_rate": 2e-4,
            "group_baseline": "standardize",
            "anchor": 0.01,
        },
    },
    "schedule": {"type": "single", "estimator": "es"},
}
trainer = hybrid_opt.Trainer(
    model,
    objective,
    ShuffledBatches(examples[:-64], 8, data.collate, seed=0),
    schedule=schedule,
    steps=options.steps,
    validation=[data.collate(examples[-64:])],
    output=options.output,
    overwrite=True,
    tokenizer=tokenizer,
)
summary = trainer.train()
print(
    f"held-out reward {summary.before['reward']:.3f} -> {summary.after['reward']:.3f}; model in {options.output}/model"
)
