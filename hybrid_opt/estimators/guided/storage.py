"""How guides are stored: whole, in fewer bits, elsewhere, or as a sketch. Next: `span.py`.

One idea: whatever the form, any slice of a guide can be read as float32, and is bitwise the slice of the whole. Guides are whole on
every rank, because each evaluates members of its own with all of their weights.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hybrid_opt.config.guided import Sketch, Storage
from hybrid_opt.engines.contract import Engine, Shard, whole_shape
from hybrid_opt.estimators.contract import zeros_and
from hybrid_opt.estimators.noise import Key, gaussian

DTYPES = {"full": torch.float32, "bfloat16": torch.bfloat16, "cpu": torch.float32}
OVERSAMPLING = 8
"""Columns beyond the rank that a sketch looks at (Halko, Martinsson & Tropp, arXiv 0909.4061)."""
POWER_ITERATIONS = 2
"""How often a sketch looks again, for matrices whose singular values fall slowly."""


class Stored(Protocol):
    """One parameter's part of a guide."""

    def read(self, start: int, count: int, device: torch.device) -> Tensor:
        """Elements `start` to `start + count`: float32 (count,), not to be written."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that is stored, by name."""
        ...


@dataclass(frozen=True)
class StoredValues:
    """All values, in some dtype on some device."""

    values: Tensor
    """(numel,)."""

    def read(self, start: int, count: int, device: torch.device) -> Tensor:
        """See `Stored.read`."""
        return self.values[start : start + count].to(device).float()

    def tensors(self) -> dict[str, Tensor]:
        """See `Stored.tensors`."""
        return {"values": self.values}


@dataclass(frozen=True)
class StoredFactors:
    """A matrix `rows @ columns` of low rank, multiplied out when read."""

    rows: Tensor
    """(m, r) float32."""
    columns: Tensor
    """(r, n) float32."""

    def read(self, start: int, count: int, device: torch.device) -> Tensor:
        """See `Stored.read`. Products are added one by one: how torch's product of matrices rounds depends on their sizes."""
        width = self.columns.shape[1]
        first, last = start // width, -(-(start + count) // width)
        block = torch.zeros(last - first, width, device=self.rows.device)
        for row, column in zip(self.rows[first:last].T, self.columns, strict=True):
            block += row[:, None] * column
        return block.view(-1)[start - first * width :][:count].to(device)

    def tensors(self) -> dict[str, Tensor]:
        """See `Stored.tensors`."""
        return {"rows": self.rows, "columns": self.columns}


@dataclass(frozen=True)
class Guide:
    """A direction for some of the parameters, zero for all others. An Estimate."""

    by_name: Mapping[str, Stored]

    def read(self, shard: Shard) -> Tensor:
        """See `Estimate.read`."""
        return zeros_and(self, shard)

    def add_to(self, out: Tensor, shard: Shard, factor: float) -> None:
        """See `Estimate.add_to`."""
        if stored := self.by_name.get(shard.name):
            out += stored.read(shard.start, len(out), out.device) * factor


def stored_guide(
    engine: Engine, names: Iterable[str], values_of: Callable[[str], Tensor | None], storage: Storage
) -> Guide:
    """A guide made of whole parameters' values, one after the other; all ranks together.

    Args:
        values_of: a parameter's values, flat float32; None where there are none.
    """
    by_name = {}
    for name in names:
        values = values_of(name)
        if values is not None:
            by_name[name] = _stored(values, whole_shape(engine.parameters[name]), storage)
    return Guide(by_name)


def restored_guide(engine: Engine, state: Mapping[str, Mapping[str, Tensor]], storage: Storage) -> Guide:
    """The guide whose parts' `tensors` these are."""
    device = torch.device("cpu") if storage.type == "cpu" else engine.device
    parts = {name: {key: tensor.to(device) for key, tensor in part.items()} for name, part in state.items()}
    return Guide(
        {name: StoredValues(**part) if "values" in part else StoredFactors(**part) for name, part in parts.items()}
    )


def _stored(values: Tensor, shape: torch.Size, storage: Storage) -> Stored:
    if isinstance(storage, Sketch):
        suits = storage.suits(tuple(shape))
        return sketched(values.view(shape), storage.rank) if suits else StoredValues(values.clone())
    device = torch.device("cpu") if storage.type == "cpu" else values.device
    return StoredValues(values.to(device, DTYPES[storage.type], copy=True))


def sketched(matrix: Tensor, rank: int) -> StoredFactors:
    """Nearly the nearest matrix of a rank: a randomised singular value decomposition, exact if the matrix has that rank.

    Its random numbers are the same for every matrix of a shape, so all ranks find the same.
    """
    width = min(rank + OVERSAMPLING, *matrix.shape)
    keys = [Key(("sketch", column)) for column in range(width)]
    basis = matrix @ gaussian(keys, 0, matrix.shape[1], matrix.device).T
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ torch.linalg.qr(basis)[0])[0])[0]
    left, scales, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    rows = basis @ left[:, :rank] * scales[:rank]
    return StoredFactors(rows.contiguous(), right[:rank].clone())
