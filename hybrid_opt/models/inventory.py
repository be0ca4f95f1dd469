"""A model's trainable parameters without its weights, for `check` and `plan`. Next: `../scheduling/policy.py`.

One idea: names, shapes and kinds of modules follow from a model's configuration, so they are worked out once, without
memory for weights, and kept in the cache folder; from then on no torch needs to be imported to answer.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from hybrid_opt.config.run import Lora, Model
from hybrid_opt.models.cache import cache_folder


@dataclass(frozen=True)
class Inventory:
    """Trainable parameters; tied ones count once."""

    shapes: dict[str, tuple[int, ...]]
    """Shape of each, by name."""
    not_low_rank: dict[str, str]
    """Those whose low rank noise cannot be evaluated, with the reason, as far as the kinds of modules tell."""


def inventory(config: Model, lora: Lora | None) -> Inventory:
    """The parameters that a run would train.

    Raises:
        UserError: there is no such model; see `models.loading`.
    """
    if config.name == "smollm2-135m" and lora is None:
        return _read(
            Path(__file__).with_name("smollm2_135m.json")
        )  # the demo's model answers at once the first time too
    path = cache_folder() / "inventories" / f"{_fingerprint(config, lora)}.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # absent, or cut off: it is made anew
        return _read(path)
    found = _work_out(config, lora)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(found)))
    return found


def _read(path: Path) -> Inventory:
    found = json.loads(path.read_text())
    return Inventory({name: tuple(shape) for name, shape in found["shapes"].items()}, found["not_low_rank"])


def _fingerprint(config: Model, lora: Lora | None) -> str:
    settings = {"model": config.model_dump(exclude={"dtype", "tokenizer"}), "lora": lora and lora.model_dump()}
    settings["format"] = [field.name for field in fields(Inventory)]
    settings["transformers"] = importlib.metadata.version("transformers")
    local = Path(config.name or "") / "config.json"
    settings["config.json"] = local.read_text(errors="replace") if config.name and os.path.isfile(local) else None
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _work_out(config: Model, lora: Lora | None) -> Inventory:
    import torch

    from hybrid_opt.models.loading import untrained, with_adapters
    from hybrid_opt.perturbations.member_hooks import why_not

    with torch.device("meta"):
        model = with_adapters(untrained(config), lora)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Inventory({name: tuple(p.shape) for name, p in trainable.items()}, why_not(model, trainable))
