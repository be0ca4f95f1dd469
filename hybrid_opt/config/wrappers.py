"""What may be put around an estimator, whichever it is. Next: `steps.py`.

One idea: a wrapper changes where an estimator looks or what becomes of its estimate, and is itself an estimator; a list of them is
applied from the inside out.
"""

from collections.abc import Mapping
from math import prod
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hybrid_opt.config.strict import Decay, Number, PositiveFloat, PositiveInt, Strict


class Wrapping(Strict):
    """What wrappers have in common."""

    replays: ClassVar[bool] = False
    """Whether it draws the directions of earlier steps again from their keys."""
    directions_from_keys: ClassVar[bool] = True
    """Whether directions still are functions of keys alone with it."""
    shapes_noise: ClassVar[bool] = False
    """Whether it changes the noise with which weights are perturbed."""
    passes: ClassVar[int] = 1
    """How often a step evaluates the estimator that it is around."""

    @property
    def needs_gradient(self) -> bool:
        """Whether it needs what backprop leaves behind."""
        return False

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes that are kept, of the size of the model or a part of it.

        Args:
            shapes: parameters that the estimator may move.
        """
        return 0


class LayerSubset(Wrapping):
    """Each step estimates and moves only a random block of consecutive layers (others in other steps)."""

    type: Literal["layer_subset"]
    layers: PositiveInt
    """Numbered layers in a block; all parameters without a layer's number (embeddings, last norm, head) count as one layer more."""


class NormCap(Wrapping):
    """An estimate longer than `norm` is scaled down to that length; its noise is drawn once more to measure it."""

    type: Literal["norm_cap"]
    norm: PositiveFloat
    """Largest norm of the estimate over all parameters, in gradient units."""


class ReplayedMomentum(Wrapping):
    """Momentum without a buffer: the estimates of the last steps, made again from their keys. No forward pass and no memory of the
    model's size; each update draws the noise of `window` steps instead of one. Where a float32 value a weight fits,
    `update: {type: momentum}` is faster and sums over all steps."""

    replays: ClassVar[bool] = True

    type: Literal["momentum"]
    beta: Decay = 0.9
    """Decay of an estimate's weight from step to step."""
    window: PositiveInt = 32
    """Latest estimates that are summed; what is left out weighs beta^window and less (0.034 for 0.9 and 32)."""


class RelativeSigma(Wrapping):
    """Each parameter's sigma is `sigma s` with `s = max(rms, floor)`, rms the root of the mean square of its values.

    Sigma is then a share of the weights' size. The estimate keeps the gradient's units: along a direction z weights are evaluated at
    `w + sigma s z`, and the estimate adds up `z / s`. No forward pass and no memory more; weights are read once a refresh.
    """

    shapes_noise: ClassVar[bool] = True
    directions_from_keys: ClassVar[bool] = False

    type: Literal["relative_sigma"]
    floor: PositiveFloat = 1e-3
    """Smallest s, for parameters that are nearly 0, such as new biases."""
    refresh: PositiveInt = 1
    """Steps for which s is kept, counted from the run's first."""


class SparseMask(Wrapping):
    """Only a share of each parameter's values is perturbed and moved: directions are M z, M a diagonal of 0 and 1, and the estimate is of
    M g. With q directions and d values in the mask its mean square error is `|M g|^2 (d + 1)/q + |g - M g|^2`.

    Dense noise alone. No forward pass more; each rank keeps a bit for each weight (two with `sensitivity`), and weights or gradients
    are read some five times to make a mask.
    """

    shapes_noise: ClassVar[bool] = True
    directions_from_keys: ClassVar[bool] = False

    type: Literal["sparse_mask"]
    keep: Annotated[float, Number, Field(gt=0, le=1)]
    """Share of a parameter's values that is in the mask, rounded to whole values, one at least; equal values at its border are all in."""
    by: Literal["small_magnitude", "sensitivity", "random"] = "small_magnitude"
    """Which: the smallest weights (Sparse MeZO, arXiv 2402.15751); those with the largest squares of the latest gradient that backprop
    took, without any whose gradient is 0 (arXiv 2406.02913; a parameter of which it has taken none yet has a random mask); or each
    value with probability `keep`."""
    refresh: PositiveInt = 100
    """Steps for which a mask is kept, counted from the run's first."""

    @property
    def needs_gradient(self) -> bool:
        """Whether masks come from backprop."""
        return self.by == "sensitivity"

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes that are kept: a bit for each value, and another for the mask that comes next."""
        return (2 if self.needs_gradient else 1) * sum(-(-prod(shape) // 8) for shape in shapes.values())


class ControlVariate(Wrapping):
    """`g_t(w) - g_t(w_a) + G_a`: off each estimate comes what the same directions and examples say at anchor weights w_a, and on comes G_a,
    the mean of the latest `terms` earlier g_s(w_a) (SVRG, Johnson & Zhang 2013; MeZO-SVRG, arXiv 2404.08080).

    G_a is what steps have found on their way, where the papers evaluate all data at each new anchor. The estimate's mean is that of
    g_t(w), whatever the shaping. Near w_a its variance is about that of one g(w_a) over the number of terms. But estimates that share a
    G_a share its error, so summed over many steps the noise is that of plain estimates and more where the loss is steeper at w_a: for the
    same forward passes more directions of a plain estimator usually go further.

    Twice the forward passes (once in the first step of an anchor), and each update draws the noise of `terms` + 1 steps instead of one.
    Keeps a copy of all weights that any estimator moves in main memory, and another on the device while w_a is evaluated.
    """

    replays: ClassVar[bool] = True
    passes: ClassVar[int] = 2

    type: Literal["control_variate"]
    refresh: Annotated[int, Number, Field(ge=2)] = 100
    """Steps for which an anchor is kept, counted from the run's first; it is the weights of the first of them that needs one."""
    terms: PositiveInt = 16
    """Most estimates in G_a, the latest ones."""

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes that are kept in float32: the anchor, and the weights' own values while it is evaluated. Parameters that other estimators
        move alone come on top."""
        return 2 * 4 * sum(map(prod, shapes.values()))


Wrapper = Annotated[
    LayerSubset | NormCap | ReplayedMomentum | RelativeSigma | SparseMask | ControlVariate, Field(discriminator="type")
]
