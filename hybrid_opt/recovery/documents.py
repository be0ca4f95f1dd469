"""What a line of a ledger may say. Next: `records.py`, which makes such lines and reads them.

One idea: a ledger may come from anywhere, so it is validated like a configuration before anything is done with it.
"""

from typing import Annotated, Literal

from pydantic import Base64Bytes, Field, model_validator
from typing_extensions import Self

from hybrid_opt.config.strict import NonNegativeInt, Strict

Places = tuple[tuple[NonNegativeInt, NonNegativeInt], ...]
"""Parameters by their places in the engine's order: `[first, end]` of each run of them."""


class SumOfNoise(Strict):
    """`sum_i c_i noise(key_i)`."""

    origin: tuple[NonNegativeInt, NonNegativeInt, str]
    """Seed, step and estimator that drew the noise."""
    keys: tuple[str, ...]
    """What was folded into the step's key for each direction; like a path, one that begins with / is complete in itself."""
    coefficients: Base64Bytes
    """c, little-endian float32."""
    parameters: Places | None = None
    """For which parameters; None: all of the part's."""
    exceptions: dict[str, Literal["dense", "frozen"]] = {}
    """Parameters that low rank noise could not reach."""

    @model_validator(mode="after")
    def _one_coefficient_a_key(self) -> Self:
        if len(self.coefficients) != 4 * len(self.keys):
            raise ValueError(f"{len(self.keys)} keys have {len(self.coefficients)} bytes of coefficients, not 4 each")
        return self


class PartOfStep(Strict):
    """One estimator's part."""

    estimator: str
    weight: float
    learning_rate: Annotated[float, Field(ge=0)]
    rested: NonNegativeInt = 0
    """Steps of a rest that the update rule's memory is told of before."""
    parameters: Places
    """What it may move."""
    sums: tuple[SumOfNoise, ...]


class RecordedStep(Strict):
    """A step."""

    step: NonNegativeInt
    policy: str
    """Digest of the policy of the step's phase."""
    parts: tuple[PartOfStep, ...]
