"""Which layers matter: a rule of a policy that is filled in by measuring. Next: `schedule.py`.

One idea: a rule may name its layers by how many there are to be, and a measurement on a batch says which.
"""

from typing import Literal

from pydantic import model_validator
from typing_extensions import Self

from hybrid_opt.config.strict import NonNegativeInt, PositiveFloat, PositiveInt, Strict


class Importance(Strict):
    """The layers with the highest measured values, of those that earlier rules leave."""

    top: PositiveInt
    """Number of layers."""
    by: Literal["gradient_norm", "sensitivity"]
    """What is measured of each layer on the batch of a step: the Euclidean norm of the gradient of its parameters, by one backward pass
    through all layers; or `sensitivity`, the same from forward passes alone, `sqrt(mean_j ((L(w + sigma z_j) - L(w - sigma z_j)) / (2 sigma))^2)`
    with noise z_j on this layer only."""
    every: NonNegativeInt = 0
    """Steps after which it is measured again; 0: once, when the policy is first needed."""
    probes: PositiveInt = 8
    """Of `sensitivity`: directions z_j in which each layer is probed, two forward passes each. The relative error of the square is about
    `sqrt(2 / probes)`."""
    sigma: PositiveFloat = 1e-3
    """Of `sensitivity`: standard deviation of the noise on a weight."""

    @model_validator(mode="after")
    def _options_are_used(self) -> Self:
        unused = {"probes", "sigma"} & self.model_fields_set
        if self.by == "gradient_norm" and unused:
            raise ValueError(
                f"{', '.join(sorted(unused))}: not used by gradient_norm; drop it, or write by: sensitivity"
            )
        return self

    def __str__(self) -> str:
        return f"the top {self.top} by {self.by}"
