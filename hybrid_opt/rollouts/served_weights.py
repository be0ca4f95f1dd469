"""The model's weights as another engine serves them: whether they are still the same, and how it gets new ones. Next: `vllm.py`.

One idea: whoever changes weights need not say so. A checksum of all bits is read where they lie, in the time of a few passes over
memory, and tells any change of a single weight for certain (others with all but certainty); only then are weights written out.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybrid_opt.engines.inspection import checksum as checksum_of

SHARED_MEMORY = Path("/dev/shm")
"""A file system in main memory, on Linux."""
ROOM = 2
"""Times a folder's size that must be free there, since others want memory too."""


def checksum(model: nn.Module) -> tuple[int, ...]:
    """The checksum of each parameter."""
    sums = [checksum_of(p) for p in model.parameters()]
    devices = {s.device for s in sums}
    return tuple(
        n for device in sorted(devices, key=str) for n in torch.stack([s for s in sums if s.device == device]).tolist()
    )


def weight_bytes(model: nn.Module) -> int:
    """Size of all parameters."""
    return sum(p.nbytes for p in model.parameters())


def new_folder(size: int) -> tempfile.TemporaryDirectory:
    """A temporary folder for so many bytes, in main memory if there is room."""
    roomy = os.access(SHARED_MEMORY, os.W_OK) and shutil.disk_usage(SHARED_MEMORY).free > ROOM * size
    return tempfile.TemporaryDirectory(prefix="hybrid-opt-", dir=SHARED_MEMORY if roomy else None)


@contextmanager
def written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Iterator[None]:
    """Inside, the folder holds the model with its weights as transformers saves them; afterwards all but the weights."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    try:
        yield
    finally:
        for file in folder.glob("*.safetensors"):
            file.unlink()
