"""Peak memory of this process. Next: `trainer.py`."""

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """On CUDA the most memory allocated on the device so far, elsewhere the process's largest resident size so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
