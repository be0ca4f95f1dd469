"""Checkpoints: everything the next step depends on, as safetensors and JSON. Next: `run_folder.py`.

One idea: a state is a tree of mappings; its tensors go to one file, its plain values to the other, and a checkpoint is
only seen under its final name when both are complete.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hybrid_opt.errors import UserError

SEPARATOR = "\t"  # between the keys on the way to a tensor: names of parameters have dots and slashes, never tabs


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write a state after `step` steps as the folder's only checkpoint.

    The one before is removed only when the new one is complete.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f".{final.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors = {SEPARATOR.join(keys): leaf for keys, leaf in _leaves(state) if isinstance(leaf, Tensor)}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside / "tensors.safetensors"
    )
    plain = [[keys, leaf] for keys, leaf in _leaves(state) if not isinstance(leaf, Tensor)]
    (aside / "values.json").write_text(json.dumps(plain))
    for file in aside.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    for other in folder.glob("step-*"):
        if other != final:
            shutil.rmtree(other)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps."""
    return max(folder.glob("step-*"), default=None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, its tensors in main memory.

    Raises:
        UserError: a file is missing or damaged.
    """
    state: dict[str, Any] = {}
    try:
        for name, tensor in load_file(path / "tensors.safetensors").items():
            _put(state, name.split(SEPARATOR), tensor)
        for keys, value in json.loads((path / "values.json").read_text()):
            _put(state, keys, value)
    except Exception as error:  # safetensors raises its own kind of error, json another
        raise UserError(f"{path}: the checkpoint cannot be read: {error}") from None
    return state


def _leaves(tree: Mapping[str, Any], way: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*way, key))
        else:
            yield (*way, key), value


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    *way, last = keys
    for key in way:
        tree = tree.setdefault(key, {})
    tree[last] = value
