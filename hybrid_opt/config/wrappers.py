"""What may be put around an estimator, whichever it is. Next: `steps.py`.

One idea: a wrapper changes where an estimator looks or what becomes of its estimate, and is itself an estimator; a list of them is
applied from the inside out.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hybrid_opt.config.strict import PositiveFloat, PositiveInt, Strict


class LayerSubset(Strict):
    """Each step estimates and moves only a random block of consecutive layers (others in other steps)."""

    type: Literal["layer_subset"]
    layers: PositiveInt
    """Numbered layers in a block; all parameters without a layer's number (embeddings, last norm, head) count as one layer more."""

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes that are kept."""
        return 0


class NormCap(Strict):
    """An estimate longer than `norm` is scaled down to that length; its noise is drawn once more to measure it."""

    type: Literal["norm_cap"]
    norm: PositiveFloat
    """Largest norm of the estimate over all parameters, in gradient units."""

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes that are kept."""
        return 0


class RelativeSigma(Strict):
    """Each parameter's sigma is `sigma s` with `s = max(rms, floor)`, rms the root of the mean square of its values.

    Sigma is then a share of the weights' size. The estimate keeps the gradient's units: along a direction z weights are evaluated at
    `w + sigma s z`, and the estimate adds up `z / s`. No forward pass and no memory more; weights are read once a refresh.
    """

    shapes_noise: ClassVar[bool] = True
    replays: ClassVar[bool] = False
    directions_from_keys: ClassVar[bool] = False

    type: Literal["relative_sigma"]
    floor: PositiveFloat = 1e-3
    """Smallest s, for parameters that are nearly 0, such as new biases."""
    refresh: PositiveInt = 1
    """Steps for which s is kept, counted from the run's first."""

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes that are kept: a number for each parameter is not counted."""
        return 0


Wrapper = Annotated[LayerSubset | NormCap | RelativeSigma, Field(discriminator="type")]
