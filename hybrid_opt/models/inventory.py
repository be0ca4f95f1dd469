"""A model's trainable parameters without its weights, for `check` and `plan`. Next: `../scheduling/policy.py`.

One idea: names and shapes follow from a model's configuration, so they are worked out once, without memory for weights,
and kept in the cache folder; from then on no torch needs to be imported to answer.
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path

from hybrid_opt.config.run import Lora, Model
from hybrid_opt.models.cache import cache_folder

Inventory = dict[str, tuple[int, ...]]
"""Shape of each trainable parameter, by name; tied parameters count once."""


def inventory(config: Model, lora: Lora | None) -> Inventory:
    """Names and shapes of the parameters that a run would train.

    Raises:
        UserError: there is no such model; see `models.loading`.
    """
    if config.name == "smollm2-135m" and lora is None:
        return _read(
            Path(__file__).with_name("smollm2_135m.json")
        )  # the demo's model answers at once the first time too
    path = cache_folder() / "inventories" / f"{_fingerprint(config, lora)}.json"
    if path.exists():
        return _read(path)
    found = _work_out(config, lora)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


def _read(path: Path) -> Inventory:
    return {name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}


def _fingerprint(config: Model, lora: Lora | None) -> str:
    settings = {"model": config.model_dump(exclude={"dtype", "tokenizer"}), "lora": lora and lora.model_dump()}
    settings["transformers"] = importlib.metadata.version("transformers")
    local = Path(config.name or "") / "config.json"
    settings["config.json"] = local.read_text() if config.name and local.is_file() else None
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _work_out(config: Model, lora: Lora | None) -> Inventory:
    import torch
    from transformers import AutoModelForCausalLM

    from hybrid_opt.models.loading import architecture, with_adapters

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture(config), trust_remote_code=config.trust_remote_code)
        model = with_adapters(model, lora)
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
