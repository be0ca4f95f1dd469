"""A state as two files. Next: `keeping.py`.

One idea: a state is a tree of mappings; its tensors go to a safetensors file and its plain values to a JSON file, so nothing that is read
back can be code.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybrid_opt.errors import UserError

SEPARATOR = "\t"  # between the keys on the way to a tensor: names of parameters have dots and slashes, never tabs


def write_state(place: Path, state: Mapping[str, Any]) -> None:
    """Make a folder that holds a state."""
    place.mkdir()
    tensors = {SEPARATOR.join(keys): leaf for keys, leaf in _leaves(state) if isinstance(leaf, Tensor)}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, place / "tensors.safetensors"
    )
    plain = [[keys, leaf] for keys, leaf in _leaves(state) if not isinstance(leaf, Tensor)]
    (place / "values.json").write_text(json.dumps(plain), encoding="utf-8")


def read_state(place: Path, state: dict[str, Any]) -> None:
    """Add to a state what `write_state` wrote.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        for name, tensor in load_file(place / "tensors.safetensors").items():
            # In the mapped file it begins anywhere, and sums of products are rounded otherwise where memory is not aligned.
            _put(state, name.split(SEPARATOR), tensor.clone())
        for keys, value in json.loads((place / "values.json").read_bytes()):
            _put(state, keys, value)
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise UserError(f"{place}: the checkpoint cannot be read: {error}") from None


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
