"""The peak of live tensors in a computation that is only pretended. Next: `step_memory.py`.

One idea: with fake tensors, which have shapes and no values, autograd runs as it always does, so what is alive at once can be counted instead
of guessed: every storage that an operation makes, from then until it is freed.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Inside, counts the bytes of storages that operations make.

    Args:
        known: tensors whose storages are there already, such as weights, and do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.total = self.peak = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and see what it has made."""
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self.sizes:
            return
        self.sizes[place] = storage.nbytes()
        self.total += storage.nbytes()
        self.peak = max(self.peak, self.total)
        weakref.finalize(storage, self._freed, place)

    def _freed(self, place: int) -> None:
        self.total -= self.sizes.pop(place, 0)
