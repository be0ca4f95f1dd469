"""What may be put around an estimator, whichever it is. Next: `steps.py`.

One idea: a wrapper changes where an estimator looks or what becomes of its estimate, and is itself an estimator; a list of them is
applied from the inside out.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hybrid_opt.config.strict import Decay, PositiveFloat, PositiveInt, Strict


class LayerSubset(Strict):
    """Each step estimates and moves only a random block of consecutive layers (others in other steps)."""

    replays: ClassVar[bool] = False

    type: Literal["layer_subset"]
    layers: PositiveInt
    """Numbered layers in a block; all parameters without a layer's number (embeddings, last norm, head) count as one layer more."""

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes that are kept."""
        return 0


class NormCap(Strict):
    """An estimate longer than `norm` is scaled down to that length; its noise is drawn once more to measure it."""

    replays: ClassVar[bool] = False

    type: Literal["norm_cap"]
    norm: PositiveFloat
    """Largest norm of the estimate over all parameters, in gradient units."""

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes that are kept."""
        return 0


class ReplayedMomentum(Strict):
    """Momentum without a buffer: the estimates of the last steps, made again from their keys. No forward pass and no memory of the
    model's size; each update draws the noise of `window` steps instead of one. Where a float32 value a weight fits,
    `update: {type: momentum}` is faster and sums over all steps."""

    replays: ClassVar[bool] = True

    type: Literal["momentum"]
    beta: Decay = 0.9
    """Decay of an estimate's weight from step to step."""
    window: PositiveInt = 32
    """Latest estimates that are summed; what is left out weighs beta^window and less (0.034 for 0.9 and 32)."""

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes of the model's size that are kept: none, for keys and coefficients are a few bytes a direction."""
        return 0


Wrapper = Annotated[LayerSubset | NormCap | ReplayedMomentum, Field(discriminator="type")]
