"""Peak memory of this process. Next: `trainer.py`."""

import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def peak_memory_bytes(device: torch.device) -> int:
    """On CUDA the most memory allocated on the device so far, elsewhere the process's largest resident size so far.

    0 where the operating system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
