"""The libraries' own random generators. Next: `../recovery/keeping.py`.

One idea: nothing here draws from them, but an objective of the user's may, and is to see the same numbers after an interruption.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators of Python, numpy and torch in this process, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state()
    state = {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {"name": name, "keys": torch.from_numpy(keys.astype(np.int64)), "rest": [place, has_gauss, cached]},
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def put_back(state: Mapping[str, Any], device: torch.device) -> None:
    """Let the generators go on from what `random_state` gave."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    np.random.set_state((numpy["name"], numpy["keys"].numpy().astype(np.uint32), *numpy["rest"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def generators_left_alone(device: torch.device) -> Iterator[None]:
    """Inside, whatever is drawn from the generators is as if it had not been."""
    state = random_state(device)
    try:
        yield
    finally:
        put_back(state, device)
