"""Shared pieces: small real models, and a run file on real data."""

import gc
import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a mistake

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid_opt.objectives.contract import FunctionObjective, count_examples


def imports_are_done() -> None:
    """From here on what is not used any more is collected, of what comes from here on."""
    gc.freeze()
    gc.enable()


def pytest_collection_finish() -> None:
    imports_are_done()


ROOT = Path(__file__).parents[1]
GLASS = ROOT / "tests/data/glass_en"
PROSE = ROOT / "tests/data/pride_and_prejudice.txt"
SPAM = ROOT / "examples/spam/spam_test.jsonl"

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TINY = {
    "llama": LLAMA_LIKE,
    "mistral": {**LLAMA_LIKE, "head_dim": 8},
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 8},
    "gemma": {**LLAMA_LIKE, "head_dim": 8, "pad_token_id": 0},
    "gemma3_text": {**LLAMA_LIKE, "head_dim": 8, "pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32, **SPECIAL},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
            "word_embed_proj_dim": 32, "max_position_embeddings": 32, **SPECIAL},
    "bert": BERT_LIKE,
    "roberta": BERT_LIKE,
    "electra": {**BERT_LIKE, "embedding_size": 16},
    "modernbert": {**BERT_LIKE, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
    "deberta-v2": {**BERT_LIKE, "relative_attention": True, "position_buckets": 4, "share_att_key": True,
                   "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "pad_token_id": 0,
                   "max_position_embeddings": 32},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
           "decoder_start_token_id": 0},
}  # fmt: skip


def tiny_model(kind: str = "llama", head: type = AutoModelForCausalLM, **changes) -> torch.nn.Module:
    """A small model of a real architecture with random weights, the same each time, norms and biases included."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = head.from_config(AutoConfig.for_model(kind, **{**TINY[kind], **changes}))
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:
                    p.add_(0.1 * torch.randn(p.shape))
    return model.eval()


def token_batch(examples: int = 3, tokens: int = 7, vocabulary: int = 64) -> dict[str, torch.Tensor]:
    """Random token ids with positions written out for each row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (examples, tokens), generator=generator)
    return {"input_ids": ids, "position_ids": torch.arange(tokens).repeat(examples, 1)}


def token_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean next-token cross-entropy of each row, (examples,)."""
    logits = model(**batch, use_cache=False).logits[:, :-1]
    labels = batch["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


@torch.no_grad()
def losses_of_members(engine, perturbation, names, members, losses=token_losses, batch=None) -> torch.Tensor:
    """What a perturbation finds where every member sees the whole batch, (members, examples)."""
    batch = token_batch() if batch is None else batch
    count = count_examples(batch)
    examples = None if count is None else torch.arange(count).expand(len(members), count)
    return perturbation.evaluate(engine, FunctionObjective(losses), batch, names, members, examples)


@torch.no_grad()
def losses_of_written_weights(engine, perturbation, names, members, losses=token_losses, batch=None) -> torch.Tensor:
    """The losses where each member's weights are really written, by what the perturbation would add in an update."""
    batch = token_batch() if batch is None else batch
    rows = []
    for member in members:
        before = {name: engine.parameters[name].data.clone() for name in names}
        for shard in engine.shards(names):
            perturbation.add_noise([member.key], torch.tensor([member.sign * perturbation.sigma]), shard, shard.data)
        rows.append(losses(engine.model, batch))
        for name in names:
            engine.parameters[name].data.copy_(before[name])
    return torch.stack(rows)


def run_document(output: Path, **changes) -> dict:
    """A run file on the small pretrained model and the spam data; `changes` replace whole sections."""
    document = {
        "model": {"name": str(GLASS)},
        "data": {
            "train": str(SPAM),
            "validation": 0.05,
            "prompt": "{subject}\n{body}\nSpam or ham?",
            "completion": " {label}",
            "choices": [" spam", " ham"],
            "max_tokens": 32,
        },
        "objective": {"type": "choice"},
        "training": {"steps": 2, "batch_size": 4, "probe_rows": 4},
        "engine": {"type": "local", "device": "cpu"},
        "schedule": "alternate",
        "output": str(output),
    }
    return {**document, **changes}


def interrupt_after(trainer, step: int) -> None:
    """Let this process get a Ctrl-C as soon as the trainer has taken a step."""
    take_step = trainer.optimizer.step

    def step_and_interrupt(*batches):
        report = take_step(*batches)
        if report.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return report

    trainer.optimizer.step = step_and_interrupt


def die_before(trainer, step: int) -> None:
    """Train, and lose power before a step: nothing is saved that has not been."""
    take_step = trainer.optimizer.step

    def step_and_die(*batches):
        if trainer.optimizer.signals.step == step:
            raise RuntimeError("power cut")
        return take_step(*batches)

    trainer.optimizer.step = step_and_die
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.train()


@pytest.fixture
def write_run(tmp_path):
    """Writes a run file with changed sections and returns its path."""

    def write(**changes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(run_document(tmp_path / "out", **changes), sort_keys=False))
        return path

    return write


class Attention(nn.MultiheadAttention):
    """It reads its output projection's weight without calling the module."""

    def __init__(self):
        super().__init__(8, 2, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x)[0]


class Recurrent(nn.Module):
    """An LSTM reads its weights from a list of its own, which it makes anew where they have changed."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        # torch sums in another order where a weight requires no gradient, unless the input is contiguous.
        return self.head(self.lstm(x)[0].contiguous())
