"""A script of one's own: a loss of one's own, batches of one's own, and a schedule that is built in code.

    python examples/finetune.py --text my_novel.txt

The loss is next-token cross-entropy with label smoothing. ES explores with every weight; backprop moves the upper half of
the layers, so its graph ends there.
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

import hybrid_opt
from hybrid_opt.config.run import Model

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", required=True, help="a text file to learn from")
parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--max-tokens", type=int, default=128)
parser.add_argument("--output", default="runs/finetune")
options = parser.parse_args()

model = hybrid_opt.load_model(Model(name=options.model), lora=None, seed=0)
tokenizer = hybrid_opt.load_tokenizer(Model(name=options.model))

# Batches: any iterable of anything; here tensors (examples, tokens), the last tenth held out.
tokens = torch.tensor(tokenizer(Path(options.text).read_text(encoding="utf-8"), verbose=False).input_ids)
blocks = tokens[: len(tokens) // options.max_tokens * options.max_tokens].view(-1, options.max_tokens)
train, held_out = blocks[: -len(blocks) // 10], blocks[-len(blocks) // 10 :]
batches = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))].split(4)


def smoothed(model, ids):
    """The loss of each example: (examples,)."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], label_smoothing=0.1, reduction="none")
    return losses.mean(dim=1)


half = model.config.num_hidden_layers // 2
schedule = {
    "estimators": {
        "es": {"type": "es", "population_size": 8, "fitness_shaping": "none", "learning_rate": 3e-5},
        "backprop": {"type": "backprop", "optimizer": "AdamW", "learning_rate": 3e-4, "gradient_clipping": 1.0},
    },
    "policy": [{"layers": f"last-{half}", "use": ["es", "backprop"]}, {"match": ".*", "use": ["es"]}],
    "schedule": {"type": "alternate", "pattern": {"es": 1, "backprop": 2}},
}
trainer = hybrid_opt.Trainer(
    model,
    smoothed,
    batches,
    schedule=schedule,
    steps=options.steps,
    validation=held_out[:32].split(8),
    output=options.output,
    overwrite=True,
    tokenizer=tokenizer,
)
summary = trainer.train()
print(f"held-out loss {summary.before['loss']:.4f} -> {summary.after['loss']:.4f}; model in {options.output}/model")
