"""Directions of equal length and orthogonal directions, made of independent ones. Next: `gram.py`, then `dense.py`.

One idea: both are a linear map of the step's Gaussian directions, and their inner products decide which; so nothing is kept but a q x q
matrix, and any slice of any direction can be made again.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.engines.inner_products import inner_products
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.contract import zeros_and
from hybrid_opt.noise.keys import Key, StepKey
from hybrid_opt.perturbations.directions import Directions, Independent
from hybrid_opt.perturbations.gram import cholesky


def sphere(gram: Tensor, values: int) -> Tensor:
    """`T = diag(sqrt(n / K_jj))`: each direction gets the length sqrt(n), so its own part stays uniform and `E z z^T = I`."""
    if not gram.diagonal().all():
        raise UserError(
            "the directions of a step are 0 in all that they move; give the estimator more parameters, or a larger mask"
        )
    return torch.diag((values / gram.diagonal()).sqrt())


def orthogonal(gram: Tensor, values: int) -> Tensor:
    """`T = sqrt(n) L^-1` with `K = L L^T`: Gram-Schmidt in the directions' order, which is QR with a positive diagonal.

    Raises:
        UserError: the directions are not independent.
    """
    identity = torch.eye(len(gram), dtype=gram.dtype)
    return math.sqrt(values) * torch.linalg.solve_triangular(cholesky(gram, values), identity, upper=False).tril()


Mixing = Callable[[Tensor, int], Tensor]
"""The Gram matrix K (q, q) float64 of directions of n values, and n -> the linear map T (q, q) float64."""
MIXINGS: dict[str, Mixing] = {"sphere": sphere, "orthogonal": orthogonal}


@dataclass(frozen=True)
class Mixed:
    """`T Z`, Z (q, n) the step's directions of another source and T (q, q) a function of their Gram matrix `K = Z Z^T`.

    K costs one drawing of all directions more in each step. With a lower triangular T direction j is a sum of the first j + 1, all of
    which are drawn to read it.

    Args:
        inner: where Z comes from.
        mixing: makes T.
    """

    inner: Directions
    mixing: Mixing
    keys: Sequence[Key] = ()
    """Of the step's directions, once it is ready."""
    matrix: Tensor | None = None
    """T, once it is ready."""

    def ready(self, engine: Engine, names: Collection[str], keys: Sequence[Key], key: StepKey) -> "Mixed":
        """See `Directions.ready`.

        Raises:
            UserError: there are no such directions.
        """
        inner = self.inner.ready(engine, names, keys, key)
        gram = inner_products(engine, names, [_Direction(inner, k) for k in keys])
        return replace(self, inner=inner, keys=tuple(keys), matrix=self.mixing(gram, inner.dimension(engine, names)))

    def dimension(self, engine: Engine, names: Collection[str]) -> int:
        """See `Directions.dimension`."""
        return self.inner.dimension(engine, names)

    def read(self, keys: Sequence[Key], name: str, start: int, count: int, device: torch.device) -> Tensor:
        """See `Directions.read`. Products and sums are taken one by one, so a slice equals that of the whole."""
        assert self.matrix is not None, "directions are read once they are ready"
        factors = self.matrix[[self.keys.index(key) for key in keys]].tolist()
        out = torch.zeros(len(keys), count, device=device)
        for j, key in enumerate(self.keys):
            wanted = [(total, row[j]) for total, row in zip(out, factors, strict=True) if row[j]]
            if wanted:
                drawn = self.inner.read([key], name, start, count, device)[0]
                for total, factor in wanted:
                    total += drawn * factor
        return out


def directions_of(distribution: str) -> Directions:
    """The source of directions that a schedule file means by `distribution`."""
    mixing = MIXINGS.get(distribution)
    return Mixed(Independent("gaussian"), mixing) if mixing else Independent(distribution)


@dataclass(frozen=True)
class _Direction:
    """One direction as an estimate."""

    source: Directions
    key: Key

    def read(self, shard: Shard) -> Tensor:
        return zeros_and(self, shard)

    def add_to(self, out: Tensor, shard: Shard, factor: float) -> None:
        drawn = self.source.read([self.key], shard.name, shard.start, len(out), out.device)[0]
        out.add_(drawn, alpha=factor)
