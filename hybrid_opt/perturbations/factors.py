"""The noise of the members that share a forward pass, as hooks use it. Next: `kept_memory.py`, then `member_hooks.py`.

One idea: what hooks of many modules need again (each row's scale, a product with an input that several modules get) is made once
and kept here for the pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybrid_opt.perturbations.kept_memory import KeptMemory


@dataclass
class Factors:
    """Noise of the members that share a forward pass.

    Members come in the order of their directions, as many of each; the members of a direction share its noise.
    """

    rows: int
    """Examples of all members together; every module's input has a multiple of them as its first dimension."""
    scale: Tensor
    """Sign times sigma of each member: (directions, members of each) float32."""
    matrices: dict[str, tuple[Tensor, Tensor]]
    """For a matrix (m, n): A (directions, r, n) and B (directions, r, m) in the matrix's dtype; a member's noise is
    `scale B^T A`."""
    vectors: dict[str, Tensor]
    """For any other parameter: (directions, *shape) float32."""
    memory: KeptMemory | None = None
    """Where large outputs may go."""
    shared: dict[str, tuple[Tensor, int, int]] = field(default_factory=dict)
    """For matrices whose modules get the same input: the A of all of them (directions, r of all, n), and which are its own."""

    _row_scales: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)
    _latest: "_Projection | None" = None

    def by_direction(self, x: Tensor) -> Tensor:
        """(members * rows, ..., features) as (directions, members of each * rows * ..., features)."""
        return x.reshape(len(self.scale), -1, x.shape[-1])

    def scale_of_each_row(self, count: int, dtype: torch.dtype) -> Tensor:
        """Each row's scale, where a direction has `count` rows: (directions, count)."""
        if (count, dtype) not in self._row_scales:
            each = self.scale.repeat_interleave(count // self.scale.shape[1], dim=1)
            self._row_scales[count, dtype] = each.to(dtype)
        return self._row_scales[count, dtype]

    def share(self, groups: Iterable[Sequence[str]]) -> None:
        """Join the factors A of matrices whose modules get the same input."""
        for names in groups:
            parts = [self.matrices[name][0] for name in names if name in self.matrices]
            if len(parts) == len(names) and len({part.shape for part in parts}) == 1:
                together, r = torch.cat(parts, dim=1), parts[0].shape[1]
                self.shared.update({name: (together, i * r, i * r + r) for i, name in enumerate(names)})

    def project(self, name: str, a: Tensor, x: Tensor) -> Tensor:
        """`A x^T` (directions, r, rows) for a matrix's A and the input x (members * rows, ..., in) of its module.

        Matrices that share an input are multiplied with it together, so it is read once.
        """
        # The transposed product is the fast one of a batched product with so few columns.
        if name not in self.shared or x.is_inference():  # such a tensor does not tell whether it has been written
            return a @ self.by_direction(x).mT
        together, first, last = self.shared[name]
        if self._latest is None or self._latest.factors is not together or not self._latest.is_of(x):
            self._latest = _Projection(x, x._version, together, together @ self.by_direction(x).mT)
        return self._latest.result[:, first:last]


_active: ContextVar[Factors | None] = ContextVar("active_factors", default=None)


def active_factors() -> Factors | None:
    """Noise of the members whose weights the model computes with at the moment; None: its own weights.

    For an objective that has more to do with the rows than to pass them on: one that drops rows on its way keeps equally many of
    each member and says so in `rows`.
    """
    return _active.get()


@contextmanager
def activated(factors: Factors) -> Iterator[None]:
    """Inside, `active_factors()` gives these."""
    token = _active.set(factors)
    try:
        yield
    finally:
        _active.reset(token)


@dataclass(frozen=True)
class _Projection:
    """A product, and what of; holding on to the input keeps its memory from being used for another."""

    x: Tensor
    version: int
    factors: Tensor
    result: Tensor

    def is_of(self, x: Tensor) -> bool:
        """Whether it is the product of this input, which has not been written since."""
        return is_same(self.x, x) and x._version == self.version


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory seen the same way, as ZeRO-3 hands each module a new view of its input."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
