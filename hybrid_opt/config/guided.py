"""Probes along what backprop left behind, beside random ones. Next: `forward_gradient.py`.

One idea: where guides come from, how they are stored and how probes use them are three choices, and each is independent of the others.
"""

from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from hybrid_opt.config.perturbations import DensePerturbation, Perturbation
from hybrid_opt.config.probing import Probing
from hybrid_opt.config.strict import Fraction, PositiveFloat, PositiveInt, Strict
from hybrid_opt.config.wrappers import Wrapper


class Gradients(Strict):
    """The latest gradients that backprop took."""

    type: Literal["gradients"]
    count: PositiveInt = 1
    """Number of gradients k, each of another step."""


class FirstMoment(Strict):
    """The running mean of gradients that backprop's optimizer keeps (Adam's first moment, SGD's momentum)."""

    type: Literal["first_moment"]

    @property
    def count(self) -> int:
        """There is one."""
        return 1


class Estimates(Strict):
    """This estimator's own latest estimates, so that it needs no backprop; their noise is drawn once more to keep them."""

    type: Literal["estimates"]
    count: PositiveInt = 1
    """Number of estimates k, each of another step."""


Guides = Annotated[Gradients | FirstMoment | Estimates, Field(discriminator="type")]
STORED_BYTES = {"full": 4, "bfloat16": 2, "cpu": 4}
"""Bytes for each value of a guide that is stored as it is."""


class Values(Strict):
    """All values of a guide: float32 (`full`), bfloat16 (half of it), or float32 in main memory (`cpu`, slower to read)."""

    type: Literal["full", "bfloat16", "cpu"]

    def bytes(self, shape: tuple[int, ...]) -> int:
        """What a parameter's part of a guide takes."""
        return STORED_BYTES[self.type] * prod(shape)


class Sketch(Strict):
    """Of each matrix the nearest one of rank r, as two factors in float32; everything else whole."""

    type: Literal["sketch"]
    rank: PositiveInt
    """Rank r of what is stored of a matrix."""

    def suits(self, shape: tuple[int, ...]) -> bool:
        """Whether factors take less memory than the values."""
        return len(shape) == 2 and self.rank * sum(shape) < prod(shape)

    def bytes(self, shape: tuple[int, ...]) -> int:
        """What a parameter's part of a guide takes."""
        return 4 * (self.rank * sum(shape) if self.suits(shape) else prod(shape))


Storage = Annotated[Values | Sketch, Field(discriminator="type")]


class Exact(Strict):
    """One pair along each guide, the others along random directions at right angles to all of them, shrunk for the least error."""

    type: Literal["exact"]
    reach: PositiveFloat = 0.1
    """Euclidean distance by which a probe along a guide moves the weights. Along gradients the loss is curved, so this is less than
    the `sigma sqrt(n)` of random probes of n weights; in narrow weights it must be enough to outlast their rounding."""


class MixedCovariance(Strict):
    """Every pair along a random direction that lies more in the guides' span than elsewhere (Guided ES, arXiv 1806.10230).

    A probe moves n weights by about `sigma sqrt((1 - alpha) n)` in the guides' span, where the loss is curved: with many weights write
    a small sigma, or alpha near 1.
    """

    type: Literal["mixed_covariance"]
    alpha: Fraction = 0.5
    """Share of a direction's energy that is spread over all weights; the rest lies in the guides' span."""
    beta: PositiveFloat = 1.0
    """Factor of the estimate; 1: the gradient's own scale in the guides' span."""


Form = Annotated[Exact | MixedCovariance, Field(discriminator="type")]


class Guided(Probing):
    """Slopes along directions that backprop left behind, the guides, and along random ones: 2 `pairs` forward passes a step.

    Memory: `guides` times the model's size, as `storage` says, whole on every rank. Noise is drawn once more, to know what it has in
    common with the guides. Parameters of which there is no guide get plain noise. While there are no guides, or the latest have been
    found to be worth less than random directions, all pairs are random.
    """

    draws_noise: ClassVar[bool] = False  # guides are no noise

    type: Literal["guided"]
    guides: Guides = Gradients(type="gradients")
    """Where the guides come from."""
    storage: Storage = Values(type="full")
    """How they are stored."""
    form: Form = Exact(type="exact")
    """How probes use them."""
    pairs: PositiveInt = 8
    """Number of antithetic pairs P; more than there are guides."""
    perturbation: Perturbation = DensePerturbation(type="dense")
    """Form of the noise: dense and gaussian."""

    @field_validator("perturbation")
    @classmethod
    def _guides_are_dense(cls, perturbation: Any) -> Any:
        if not isinstance(perturbation, DensePerturbation):
            raise ValueError(
                "a guide has a value for each weight, which low rank noise cannot follow; write perturbation: {type: dense}"
            )
        if perturbation.distribution != "gaussian":
            raise ValueError(
                f"what is left of {perturbation.distribution} noise at right angles to the guides is {perturbation.distribution} no "
                "more; write distribution: gaussian"
            )
        return perturbation

    @model_validator(mode="after")
    def _some_pairs_are_random(self) -> Self:
        if self.pairs <= self.guides.count:
            raise ValueError(
                f"pairs: {self.pairs} leaves no pair to look beyond {self.guides.count} guides, so what they miss would stay unknown; "
                f"write {self.guides.count + 1} or more"
            )
        return self

    def unsuited(self, wrapper: Wrapper) -> str:
        """See `DirectStep.unsuited`."""
        return (
            "its noise is kept at right angles to the guides, which the wrapper would not reach; use spsa, or narrow what it moves by the "
            "policy or layer_subset"
        )

    @property
    def directions_from_keys(self) -> bool:
        """No: they are those of the guides, too."""
        return False

    @property
    def needs_gradient(self) -> bool:
        """Whether guides come from backprop."""
        return self.guides.type != "estimates"

    @property
    def forwards(self) -> int:
        """Two a pair."""
        return 2 * self.pairs

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """See `Probing.keeps`; and the guides."""
        where = "guides in main memory" if self.storage.type == "cpu" else "guides"
        return super().keeps(shapes) | {where: self.guides.count * sum(map(self.storage.bytes, shapes.values()))}
