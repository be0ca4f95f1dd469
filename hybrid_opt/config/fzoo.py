"""Options of `fzoo`, steps of a length that the losses' spread decides. Next: `guided.py`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from hybrid_opt.config.perturbations import DensePerturbation, Perturbation
from hybrid_opt.config.probing import Probing
from hybrid_opt.config.strict import Number
from hybrid_opt.config.wrappers import RelativeSigma, Wrapper


class Fzoo(Probing):
    """One-sided slopes along N random directions, divided by the standard deviation of the losses (FZOO, arXiv 2506.09034).

    N + 1 forward passes a step, one of them at the weights as they are, and no memory. The estimate has no gradient units: where the loss
    is linear over sigma its length is about sqrt((n + N - 1)/N) for n values, however steep the loss is, so learning_rate alone decides how
    far a step goes.
    """

    type: Literal["fzoo"]
    population_size: Annotated[int, Number, Field(ge=2)] = 8
    """Number of directions N, each evaluated with one sign."""
    perturbation: Perturbation = DensePerturbation(type="dense", distribution="rademacher")
    """Form of the noise."""
    reuse: bool = False
    """True: draw only half of the directions anew, and take the other half with the losses that they had in the step before, at the
    weights and on the examples of that step: N/2 + 1 forward passes (in the first step N + 1)."""

    @model_validator(mode="after")
    def _halves_can_be_reused(self) -> Self:
        if not self.reuse:
            return self
        n = self.population_size
        if n % 2 or n < 4:
            raise ValueError(
                f"reuse draws half of the population anew, so population_size must be even and 4 or more, not {n}; write "
                f"{max(4, n + n % 2)}, or reuse: false"
            )
        if getattr(self.perturbation, "distribution", None) == "orthogonal":
            raise ValueError(
                "reuse takes directions of the step before, to which those of distribution: orthogonal are not orthogonal; write "
                "distribution: sphere, or reuse: false"
            )
        if self.perturbation.type == "lazy_subspace":
            raise ValueError(
                "reuse takes directions of the step before, which may be of another subspace than this step's (lazy_subspace); write "
                "perturbation: {type: low_rank}, or reuse: false"
            )
        if any(wrapper.type == "layer_subset" for wrapper in self.wrappers):
            raise ValueError(
                "reuse takes losses of the step before, in which layer_subset perturbed other layers; drop one of them"
            )
        if any(wrapper.passes > 1 for wrapper in self.wrappers):
            raise ValueError(
                "reuse takes losses of the evaluation before, which control_variate made at other weights; write reuse: false, or take "
                "control_variate off"
            )
        return self

    def unsuited(self, wrapper: Wrapper) -> str:
        """See `DirectStep.unsuited`."""
        if self.reuse:
            return f"reuse takes directions of the step before, which had other noise; write reuse: false, or take {wrapper.type} off"
        if isinstance(wrapper, RelativeSigma):
            return "its steps have one length, which parameters with a small sigma would make up; take relative_sigma off, or use spsa"
        return super().unsuited(wrapper)

    @property
    def forwards(self) -> int:
        """One a direction that is drawn anew, and one at the weights as they are; the first step's with `reuse` are more."""
        return self.population_size // (2 if self.reuse else 1) + 1

    @property
    def directions(self) -> int:
        """One a member, reused or not."""
        return self.population_size
