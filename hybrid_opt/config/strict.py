"""The pydantic settings and number types that every configuration model shares. Next: `perturbations.py`."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Strict(BaseModel):
    """A frozen model that refuses unknown keys, NaN and infinity, and shows attribute docstrings as field help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value}")
    return value


Number = BeforeValidator(_no_truth_value)
"""Refuses `true` and `yes`, which Python would take for 1."""
PositiveInt = Annotated[int, Number, Field(ge=1)]
NonNegativeInt = Annotated[int, Number, Field(ge=0)]
PositiveFloat = Annotated[float, Number, Field(gt=0)]
NonNegativeFloat = Annotated[float, Number, Field(ge=0)]
Fraction = Annotated[float, Number, Field(gt=0, lt=1)]
Share = Annotated[float, Number, Field(ge=0, lt=1)]
Decay = Share
Text = Annotated[str, Field(min_length=1)]
