"""Which sizes of model fit where: ES against AdamW against ZeRO, on a device and as many of them as there are. Next: `prediction.py`.

One idea: the question is asked before there is a run file, so a size is a row of published numbers, and each way to train it is a run file
made here, whose memory is predicted like any other's.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.table import Table

from hybrid_opt.config.run import Model, RunFile
from hybrid_opt.errors import UserError, did_you_mean
from hybrid_opt.objectives.causal_lm import CausalLmObjective
from hybrid_opt.planning.prediction import Batch, Predictor
from hybrid_opt.planning.step_memory import PretendedModel


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    shape = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    common = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
    return {"model_type": "qwen3", **shape, **common, "tie_word_embeddings": tied}


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, False),
}  # fmt: skip
"""Published sizes: Qwen2.5 (arXiv 2412.15115) and Qwen3 (arXiv 2505.09388) and their models' config.json. As a check, they add up to the
published numbers of parameters: .49, .60, 1.7, 4.0, 8.2, 14.8 and 32.8 billion."""

DEVICES = {
    "rtx4090-24gb": 24, "l40s-48gb": 48, "a100-40gb": 40, "a100-80gb": 80, "h100-80gb": 80, "h200-141gb": 141, "b200-180gb": 180,
}  # fmt: skip
"""Memory of accelerators in 1e9 bytes, by their makers' data sheets."""

OBJECTIVE = CausalLmObjective()
BF16 = {"dtype": "bfloat16"}
ES = {
    "type": "es", "learning_rate": 1.0, "fitness_shaping": "none", "members_per_forward": 1, "micro_batch_size": 1,
}  # fmt: skip
ADAMW = {"type": "backprop", "optimizer": "AdamW", "learning_rate": 1.0}
CHECKPOINTED = {**ADAMW, "gradient_checkpointing": True}
LOCAL, ZERO2, ZERO3 = {"type": "local"}, {"type": "zero", "zero_stage": 2}, {"type": "zero", "zero_stage": 3}
ROUNDED = {"master_weights": "stochastic_rounding"}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "ES": (ES, {**LOCAL, **ROUNDED}, False),
    "LoRA": (CHECKPOINTED, LOCAL, True),
    "AdamW, checkpointed": (CHECKPOINTED, LOCAL, False),
    "AdamW": (ADAMW, LOCAL, False),
    "ES, ZeRO-3": (ES, {**ZERO3, **ROUNDED}, False),
    "AdamW, ZeRO-2": (CHECKPOINTED, ZERO2, False),
    "AdamW, ZeRO-3": (CHECKPOINTED, ZERO3, False),
}
"""Ways to train: an estimator, an engine, and whether on adapters. Under ZeRO checkpointed too."""


def config_of(name: str, family: str) -> tuple[str, Model]:
    """The full name of a size, and its model without weights.

    Args:
        name: a name in `CONFIGS`, the end of one of the family (`8b`), or a folder with a config.json.
        family: such as `qwen3`.

    Raises:
        UserError: there is none.
    """
    known = {name: name, f"{family}-{name}": f"{family}-{name}"}
    found = next((full for full in known if full in CONFIGS), None)
    if found:
        return found, Model(config=CONFIGS[found], tokenizer="none", **BF16)
    if (Path(name) / "config.json").is_file():
        return Path(name).name, Model(name=name, **BF16)
    raise UserError(
        f"--model-config: {name!r} is no known size and no folder with a config.json{did_you_mean(name, CONFIGS)}; known: {', '.join(CONFIGS)}"
    )


def device_bytes(device: str) -> int:
    """The memory of a device by its name, or as it is written.

    Raises:
        UserError: neither.
    """
    if device in DEVICES:
        return DEVICES[device] * 10**9
    try:
        return int(TypeAdapter(ByteSize).validate_python(device))
    except ValidationError:
        raise UserError(
            f"--device: {device!r} is no known device{did_you_mean(device, DEVICES)} and no size; write one of {', '.join(DEVICES)}, or such as 24GB"
        ) from None


def sizes_table(
    names: Sequence[str], device: str, world_size: int, batch_size: int, tokens: int
) -> Iterator[Table | str]:
    """Model by way to train: GB on each device, and whether that fits.

    Args:
        batch_size, tokens: examples on each device, and tokens of each.
    """
    limit = device_bytes(device)
    title = f"GB on each of {world_size} x {device}" if world_size > 1 else f"GB on {device}"
    table = Table(
        "model",
        "parameters",
        *WAYS,
        title=f"{title}, {batch_size} examples of {tokens} tokens each, bfloat16",
        title_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    family = "qwen3"
    for name in names:
        full, model = config_of(name, family)
        family = full.partition("-")[0]
        pretended: dict[bool, PretendedModel] = {}
        cells = []
        for estimator, engine, adapted in WAYS.values():
            run = _run(model, estimator, engine, adapted, batch_size, tokens)
            if adapted not in pretended:
                pretended[adapted] = PretendedModel(model, run.peft, "bfloat16")
            peak = _peak(run, pretended[adapted], batch_size, tokens, world_size)
            cells.append(f"[green]{peak / 1e9:.3g}[/]" if peak <= limit else f"[red]{peak / 1e9:.3g} no[/]")
        values = sum(p.numel() for p in pretended[False].module.parameters())
        table.add_row(full, f"{values / 1e9:.3g}B", *cells)
    yield table
    yield (
        f"no: more than {limit / 1e9:.4g} GB. ES: low rank, one member and example a forward pass at the least, weights rounded at random (no float32 copy); AdamW: float32 masters and moments; "
        "LoRA, rank 8, and all under ZeRO: gradient checkpointing. What fragmentation takes comes on top."
    )


def _run(model: Model, estimator: dict, engine: dict, adapted: bool, batch_size: int, tokens: int) -> RunFile:
    return RunFile.model_validate(
        {
            "model": model.model_dump(exclude_none=True),
            "peft": {} if adapted else None,
            "data": {"train": "none.txt", "text": "text", "max_tokens": tokens},
            "objective": {"type": "causal_lm"},
            "training": {"steps": 1, "batch_size": batch_size},
            "engine": engine,
            "schedule": {"estimators": {"it": estimator}, "schedule": {"type": "single", "estimator": "it"}},
            "output": "none",
        }
    )


def _peak(run: RunFile, pretended: PretendedModel, batch_size: int, tokens: int, world_size: int) -> int:
    ranks = world_size if run.engine.type == "zero" else 1
    ids = torch.ones(batch_size * ranks, tokens, dtype=torch.long)
    positions = torch.arange(tokens).repeat(len(ids), 1)
    values = {
        "input_ids": ids,
        "attention_mask": ids,
        "position_ids": positions,
        "labels": ids,
        "logits_to_keep": tokens,
    }
    batches = {"it": Batch(OBJECTIVE, values)}
    return max(found.peak for found in Predictor(run, pretended, batches, world_size=ranks, device="cuda").phases())
