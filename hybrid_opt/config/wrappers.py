"""What may be put around an estimator, whichever it is. Next: `steps.py`.

One idea: a wrapper changes where an estimator looks or what becomes of its estimate, and is itself an estimator; a list of them is
applied from the inside out.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

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


Wrapper = Annotated[LayerSubset | NormCap, Field(discriminator="type")]
