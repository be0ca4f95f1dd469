"""The libraries' own random generators. Next: `../recovery/keeping.py`.

One idea: nothing here draws from them, but an objective of the user's may, and is to see the same numbers after an interruption.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Generators:
    """The generators of Python, numpy and torch in this process.

    Args:
        device: the one whose generator counts beside the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state_dict(self) -> dict[str, Any]:
        """Where they are, as tensors and plain values."""
        version, words, gauss = random.getstate()
        name, keys, place, has_gauss, cached = np.random.get_state()
        state = {
            "python": {"version": version, "words": list(words), "gauss": gauss},
            "numpy": {
                "name": name,
                "keys": torch.from_numpy(keys.astype(np.int64)),
                "rest": [place, has_gauss, cached],
            },
            "torch": torch.get_rng_state(),
        }
        return state | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let them go on from there."""
        python, numpy = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
        np.random.set_state((numpy["name"], numpy["keys"].numpy().astype(np.uint32), *numpy["rest"]))
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Inside, whatever is drawn from them is as if it had not been."""
        state = self.state_dict()
        try:
            yield
        finally:
            self.load_state_dict(state)
