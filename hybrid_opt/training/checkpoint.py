"""Checkpoints: everything the next step depends on, as safetensors and JSON. Next: `run_folder.py`.

One idea: a state is a tree of mappings; its tensors go to one file, its plain values to the other, and a checkpoint is
only seen under its final name when both are complete.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hybrid_opt.engines.ranks import Ranks
from hybrid_opt.errors import UserError

SEPARATOR = "\t"  # between the keys on the way to a tensor: names of parameters have dots and slashes, never tabs


def save_checkpoint(folder: Path, step: int, ranks: Ranks, write: Callable[[Path], Mapping[str, Any]]) -> Path:
    """Write a state after `step` steps as the folder's only checkpoint; to be called by all ranks.

    The one before is removed only when the new one is complete.

    Args:
        write: writes what it likes into the checkpoint, and returns the rest of this rank's state.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f".{final.name}"
    if ranks.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    ranks.wait()
    _write_state(_of_rank(aside, ranks.rank), write(aside))
    ranks.wait()
    if ranks.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        for other in folder.glob("step-*"):
            if other != final:
                shutil.rmtree(other)
    ranks.wait()
    return final


def _of_rank(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"rank-{rank}"


def _write_state(place: Path, state: Mapping[str, Any]) -> None:
    place.mkdir()
    tensors = {SEPARATOR.join(keys): leaf for keys, leaf in _leaves(state) if isinstance(leaf, Tensor)}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, place / "tensors.safetensors"
    )
    plain = [[keys, leaf] for keys, leaf in _leaves(state) if not isinstance(leaf, Tensor)]
    (place / "values.json").write_text(json.dumps(plain))
    for file in place.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps."""
    return max(folder.glob("step-*"), default=None)


def load_checkpoint(path: Path, rank: int = 0) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote for a rank, completed by rank 0's; its tensors in main memory.

    Raises:
        UserError: a file is missing or damaged.
    """
    state: dict[str, Any] = {}
    try:
        _read_state(_of_rank(path, 0), state)
        if rank and _of_rank(path, rank).exists():  # if not, there were fewer ranks, as rank 0's state tells
            _read_state(_of_rank(path, rank), state)
    except Exception as error:  # safetensors raises its own kind of error, json another
        raise UserError(f"{path}: the checkpoint cannot be read: {error}") from None
    return state


def _read_state(place: Path, state: dict[str, Any]) -> None:
    for name, tensor in load_file(place / "tensors.safetensors").items():
        _put(state, name.split(SEPARATOR), tensor)
    for keys, value in json.loads((place / "values.json").read_text()):
        _put(state, keys, value)


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
    if isinstance(value, dict) and not value:
        tree.setdefault(last, {})  # rank 0 may have had more
    else:
        tree[last] = value
