"""A script of one's own on several GPUs (or CPU processes): the same as `examples/finetune.py`, under DeepSpeed ZeRO.

    deepspeed --num_gpus 2 examples/deepspeed/finetune.py --text my_novel.txt
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 examples/deepspeed/finetune.py --text my_novel.txt

Every process runs this whole file and passes the same batches; which part of the work is whose is not your concern. ES moves all
weights; backprop moves the last two layers, so that only those need optimizer state, gradients and float32 masters.
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

import hybrid_opt
from hybrid_opt.config.engines import ZeroEngine
from hybrid_opt.config.run import Model

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", required=True, help="a text file to learn from")
parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
parser.add_argument("--stage", type=int, default=3, choices=(1, 2, 3), help="of ZeRO")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--max-tokens", type=int, default=128)
parser.add_argument("--output", default="runs/deepspeed")
parser.add_argument("--local_rank", type=int, help="the deepspeed launcher passes it; it is in the environment, too")
options = parser.parse_args()

# The same on every process: the weights of rank 0 are taken, and each process keeps its part of them.
model = hybrid_opt.load_model(Model(name=options.model), lora=None, seed=0)
tokenizer = hybrid_opt.load_tokenizer(Model(name=options.model))

# Batches: tensors (examples, tokens), with a seed of their own so that every process has the same; the last tenth held out.
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


schedule = {
    "estimators": {
        "es": {"type": "es", "population_size": 8, "fitness_shaping": "none", "learning_rate": 3e-5},
        "backprop": {"type": "backprop", "optimizer": "AdamW", "learning_rate": 3e-4, "gradient_clipping": 1.0},
    },
    "policy": [{"layers": "last-2", "use": ["es", "backprop"]}, {"match": ".*", "use": ["es"]}],
    "schedule": {"type": "alternate", "pattern": {"es": 1, "backprop": 2}},
}
trainer = hybrid_opt.Trainer(
    model,
    smoothed,
    batches,
    schedule=schedule,
    steps=options.steps,
    engine=ZeroEngine(type="zero", zero_stage=options.stage),
    validation=held_out[:32].split(8),
    output=options.output,  # on a file system that all machines see; rank 0 writes
    overwrite=True,
    tokenizer=tokenizer,
)
summary = trainer.train()
if trainer.ranks.rank == 0:
    print(f"held-out loss {summary.before['loss']:.4f} -> {summary.after['loss']:.4f}; model in {options.output}/model")
