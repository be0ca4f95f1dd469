"""Memory of very large outputs, for the next forward pass to find again. Next: `member_hooks.py`.

One idea: the system gives and takes back large pieces of main memory page by page, which for a model's logits takes longer than
to compute what is written there; so a piece is kept, and handed out again when nobody holds anything in it any more.
"""

import torch
from torch import Tensor

LARGE_BYTES = 32 << 20
"""From here on the C library asks the system for every piece anew, and keeps smaller ones by itself."""
KEPT_BYTES = 512 << 20
"""Most memory that is kept."""


class KeptMemory:
    """Hands out large pieces of main memory again and again."""

    def __init__(self) -> None:
        self._pieces: list[tuple[Tensor, int]] = []  # and how many hold it when it is free

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """A piece of this shape, with anything in it; None where torch's own way to get one is as good."""
        size = dtype.itemsize * torch.Size(shape).numel()
        if device.type != "cpu" or dtype != torch.float32 or not LARGE_BYTES <= size <= KEPT_BYTES or _holders is None:
            return None  # a CPU computes in narrow types so slowly that pages do not count, and their updates need the room
        for piece, alone in self._pieces:
            if piece.shape == shape and piece.dtype == dtype and _holders(piece) == alone:
                return piece.view(shape)
        self._pieces = [(p, alone) for p, alone in self._pieces if _holders(p) != alone]  # free, but of no use now
        if size + sum(p.nbytes for p, _ in self._pieces) > KEPT_BYTES:
            return None
        piece = torch.empty(shape, dtype=dtype)
        self._pieces.append((piece, _holders(piece)))
        return piece.view(shape)


def _count_holders(tensor: Tensor) -> int:
    """How many tensors share the memory, views that are not known to be views included."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


_holders = _count_holders if hasattr(torch._C, "_storage_Use_Count") else None
"""None where this version of torch does not tell; then nothing is kept."""
