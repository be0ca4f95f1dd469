"""The final model on disk, as transformers loads it. Next: `curves.py`."""

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import save_model as save_module
from torch import nn


def save_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write `folder/model`, complete in itself; for a model with adapters also the adapters alone in `folder/adapter`.

    A model that is not transformers' own gets its state dict in `model/model.safetensors`.
    """
    place = folder / "model"
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / "adapter")
        model = copy.deepcopy(model).merge_and_unload()  # the caller's keeps its adapters
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(place)
    else:
        place.mkdir(exist_ok=True)
        save_module(model, str(place / "model.safetensors"))
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
