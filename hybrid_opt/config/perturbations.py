"""Forms of noise that a schedule file may choose: how a random direction changes the weights. Next: `wrappers.py`."""

from collections.abc import Mapping
from math import prod
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hybrid_opt.config.strict import PositiveInt, Strict

KEPT_NOISE = 256 << 20
"""Most bytes of low rank noise that are kept from a step's evaluation to its update; more is drawn again."""


class DensePerturbation(Strict):
    """Every weight gets a noise value of its own; one member is evaluated at a time with perturbed weights."""

    type: Literal["dense"]
    distribution: Literal["gaussian", "rademacher", "sphere", "orthogonal"] = "gaussian"
    """Distribution of a noise value: standard normal, or -1 and +1 with equal probability; or Gaussian directions that all get the length
    sqrt(n), for n values that are moved (`sphere`), or that length and right angles to each other within a step (`orthogonal`, at most n
    directions). With q directions and gradient g the mean square error of the mean slope is |g|^2 times (n + 1)/q, (n - 1)/q,
    (n - 1)/q and n/q - 1. The last two draw all noise once more a step to measure it; and the j-th of the orthogonal directions is a
    sum of j, so evaluating all of them draws (q + 1)/2 times as much noise."""
    backup: Literal["layer", "model"] = "layer"
    """Perturb each module while it runs, or write the whole model for each member and keep a copy of it: more memory, and
    faster where a member's evaluation calls the model many times, such as in generation."""

    directions_from_keys: ClassVar[bool] = True

    def keeps(self, shapes: Mapping[str, tuple[int, ...]], directions: int) -> dict[str, int]:
        """Bytes beyond those of inference in float32: the weights of the module that runs, or of all."""
        sizes = [4 * prod(shape) for shape in shapes.values()]
        return {"copy of weights": sum(sizes) if self.backup == "model" else max(sizes, default=0)}


class LowRankPerturbation(Strict):
    """Matrices get `B^T A / sqrt(noise_rank)`; many members share one forward pass and weights are never written."""

    type: Literal["low_rank"]
    noise_rank: PositiveInt = 1
    """Rank r of a matrix's perturbation (vectors always get full noise)."""
    otherwise: Literal["refuse", "dense", "frozen"] = "refuse"
    """What to do with a parameter that cannot be evaluated low rank (`hybrid-opt check` lists them): an error, dense noise
    and one member a forward pass, or no noise and no update."""

    @property
    def directions_from_keys(self) -> bool:
        """See `DirectStep`; which parameters get dense noise or none is found by an evaluation, which a resumed run has not made."""
        return self.otherwise == "refuse"

    def keeps(self, shapes: Mapping[str, tuple[int, ...]], directions: int) -> dict[str, int]:
        """Bytes beyond those of inference: a step's noise, until the update has used it."""
        values = sum(self.noise_rank * sum(shape) if len(shape) == 2 else prod(shape) for shape in shapes.values())
        return {"noise": min(KEPT_NOISE, 4 * values * directions)}


class LazySubspace(LowRankPerturbation):
    """Low rank noise `s U V^T` whose U (m, r) lasts for many steps, so that these move a matrix (m, n) in U's column space alone (LOZO,
    arXiv 2410.07698; SubZero, arXiv 2410.08989). V (n, r) is drawn for each direction, and vectors get full noise.

    As many forward passes as with `low_rank`, and of each matrix the side that lasts is kept, in float32.
    """

    type: Literal["lazy_subspace"]
    refresh: PositiveInt = 50
    """Steps for which a subspace lasts, counted from the run's first."""
    side: Literal["left", "right"] = "left"
    """Which side lasts: `left` U, on the side of a layer's outputs, or `right` V, on that of its inputs (LOZO), so that rows of a
    gradient are projected instead of columns and n takes the place of m."""
    basis: Literal["gaussian", "orthonormal"] = "orthonormal"
    """What lasts: standard normal values (LOZO), or orthonormal columns (SubZero; needs r <= m)."""
    norm_alignment: bool = True
    """True: a perturbation is on the average as long as a full one, `E |E|^2 = m n`: s is `sqrt(m/r)` for an orthonormal basis and
    `sqrt(1/r)` for a Gaussian one. The estimate's mean is then `m/r P_U g` (`U U^T g / r`), P_U g the gradient's projection onto U's
    columns, and over many subspaces g. False: `E |E|^2 = r n`, s is 1 (`sqrt(1/m)`), and the mean is P_U g (`U U^T g / m`)."""

    def keeps(self, shapes: Mapping[str, tuple[int, ...]], directions: int) -> dict[str, int]:
        """Bytes beyond those of inference: a step's noise, until the update has used it, and the sides that last."""
        lasts, drawn = (0, 1) if self.side == "left" else (1, 0)
        matrices = [shape for shape in shapes.values() if len(shape) == 2]
        vectors = sum(prod(shape) for shape in shapes.values() if len(shape) != 2)
        fresh = vectors + self.noise_rank * sum(shape[drawn] for shape in matrices)
        subspace = 4 * self.noise_rank * sum(shape[lasts] for shape in matrices)
        return {"noise": min(KEPT_NOISE, 4 * fresh * directions), "subspace": subspace}


Perturbation = Annotated[DensePerturbation | LowRankPerturbation | LazySubspace, Field(discriminator="type")]
