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
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybrid_opt.noise.drawing import block_size

SHARED_MEMORY = Path("/dev/shm")
"""A file system in main memory, on Linux."""
ROOM = 2
"""Times a folder's size that must be free there, since others want memory too."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MULTIPLIER = 6364136223846793005
"""An odd number with good mixing, of Knuth's linear congruential generator."""


@torch.no_grad()
def checksum(model: nn.Module) -> tuple[int, ...]:
    """A number for each parameter that depends on the bits and the order of its elements: `sum_i (2i + 1) bits_i` of a block,
    `MULTIPLIER * sum + block` from one to the next, modulo 2^64.

    An odd factor has an inverse modulo 2^64, so a change of one element always changes the number.
    """
    sums = [_checksum(p) for p in model.parameters()]
    devices = {s.device for s in sums}
    return tuple(
        n for device in sorted(devices, key=str) for n in torch.stack([s for s in sums if s.device == device]).tolist()
    )


def _checksum(weights: Tensor) -> Tensor:
    bits = weights.detach().contiguous().view(-1).view(BITS[weights.element_size()])
    block = block_size(bits.device)
    odd = torch.arange(1, 2 * min(block, len(bits)) + 1, 2, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in bits.split(block):
        total = total * MULTIPLIER + (piece.long() * odd[: len(piece)]).sum()
    return total


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
