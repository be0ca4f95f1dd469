"""What guides span. Next: `designs.py`.

One idea: all that is needed to make guides orthonormal, and to know what noise has in common with them, are inner products, so no rank
holds a direction whole that it does not hold already.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine
from hybrid_opt.estimators.dense import DensePerturbation
from hybrid_opt.estimators.guided.storage import Guide
from hybrid_opt.estimators.inner_products import inner_products
from hybrid_opt.estimators.noise import Key
from hybrid_opt.estimators.probing import NoiseSum

NEW_SHARE = 1e-4
"""Least share of a guide's energy that must lie outside the span of those before it: less is the rounding of float32."""


@dataclass(frozen=True)
class Span:
    """An orthonormal basis U of what guides G span, and what noise has in it."""

    basis: Tensor
    """R (guides, k) float64, `U = G R`."""
    noise: Tensor
    """`<z_i, u_j>`, (keys, k) float64."""


def span(engine: Engine, names: Collection[str], guides: Sequence[Guide], keys: Sequence[Key]) -> Span:
    """The span of guides over the named parameters, and the coordinates of each key's gaussian noise in it; all ranks together."""
    if not guides:
        return Span(torch.zeros(0, 0, dtype=torch.float64), torch.zeros(len(keys), 0, dtype=torch.float64))
    one, perturbation = torch.ones(1, dtype=torch.float64), DensePerturbation("gaussian", 1.0)
    noises = [NoiseSum(perturbation, [key], one) for key in keys]
    products = inner_products(engine, names, guides, [*guides, *noises])
    basis = orthonormal(products[:, : len(guides)])
    return Span(basis, products[:, len(guides) :].nan_to_num(0.0, 0.0, 0.0).T @ basis)


def orthonormal(gram: Tensor) -> Tensor:
    """Coefficients R (guides, k) with `R^T gram R = 1`: Gram and Schmidt's method in the order of the guides.

    A guide that is zero, not finite, or (nearly) a sum of those before it is left out, so k may be less than there are guides.

    Args:
        gram: (guides, guides) float64.
    """
    usable = gram.diagonal().isfinite() & (gram.diagonal() > 0)
    gram = torch.where(usable[:, None] & usable, gram, 0.0)
    columns: list[Tensor] = []
    for i in usable.nonzero().flatten().tolist():
        column = torch.zeros(len(gram), dtype=torch.float64)
        column[i] = gram[i, i] ** -0.5
        for other in columns * 2:  # a second time, for what rounding left over from the first
            column = column - (other @ gram @ column) * other
        share = column @ gram @ column
        if share > NEW_SHARE:
            columns.append(column / share.sqrt())
    return torch.stack(columns, dim=1) if columns else torch.zeros(len(gram), 0, dtype=torch.float64)
