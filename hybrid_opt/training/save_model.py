"""The final model on disk, as transformers loads it. Next: `../run_files/curves.py`."""

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from hybrid_opt.engines.contract import Engine, is_spread
from hybrid_opt.run_files.durable import written_aside


def save_model(engine: Engine, tokenizer: Any, folder: Path) -> None:
    """Write `folder/model`, complete in itself; where nothing but adapters was trained also these alone in `folder/adapter`.

    A model that is not transformers' own gets its state dict in `model/model.safetensors`. All ranks must call this; rank 0
    writes.

    Raises:
        CannotWriteError: the operating system does not let it be written; what was there is as it was.
    """
    weights, model = engine.whole_weights(), engine.model
    if weights is None:
        return
    if hasattr(model, "merge_and_unload") and all("lora_" in name for name in engine.parameters):
        with written_aside(folder / "adapter") as place:
            model.save_pretrained(place, state_dict=weights)
    with written_aside(folder / "model") as place:
        _save(model, weights, place)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)


def _save(model: nn.Module, weights: dict[str, Tensor], place: Path) -> None:
    if hasattr(model, "merge_and_unload"):
        merged = _copy_of(model, weights).merge_and_unload()  # the caller's keeps its adapters
        merged.save_pretrained(place)
    elif hasattr(model, "save_pretrained"):
        model.save_pretrained(place, state_dict=weights)
    else:
        place.mkdir()
        once = {(tensor.data_ptr(), tensor.shape): name for name, tensor in reversed(weights.items())}  # tied ones
        save_file({name: weights[name].contiguous() for name in once.values()}, place / "model.safetensors")


def _copy_of(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A model with adapters once more, with weights of its own; one whose weights are spread over ranks is built anew."""
    if not any(map(is_spread, model.parameters())):
        return copy.deepcopy(model)
    import peft  # whoever has such a model has it

    base = model.get_base_model()
    (settings,) = model.peft_config.values()
    fresh = peft.get_peft_model(type(base)(copy.deepcopy(base.config)).to(base.dtype), settings)
    fresh.load_state_dict(weights)
    return fresh
