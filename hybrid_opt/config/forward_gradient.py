"""Options of the estimator that takes slopes by forward-mode differentiation. Next: `estimators.py`."""

from collections.abc import Mapping
from math import prod
from typing import ClassVar, Literal

from hybrid_opt.config.steps import DirectStep
from hybrid_opt.config.strict import PositiveInt, Share
from hybrid_opt.config.wrappers import RelativeSigma, Wrapper


class ForwardGradient(DirectStep):
    """Exact slopes along k random directions by forward-mode differentiation (Baydin et al., arXiv 2202.08587): no sigma, no
    backward pass; k forward passes a step that carry slopes along, each of which takes about 3 plain ones. Beyond inference it
    keeps a tangent for the weights of the module that runs and for its activations."""

    differentiates: ClassVar[bool] = True
    directions_from_keys: ClassVar[bool] = True
    draws_noise: ClassVar[bool] = True

    type: Literal["forward_gradient"]
    tangents: PositiveInt = 1
    """Number of directions k; their estimates are averaged."""
    distribution: Literal["gaussian", "rademacher", "sphere", "orthogonal"] = "rademacher"
    """As that of dense noise; the last two draw it once more a step."""
    micro_batch_size: PositiveInt | None = None
    """Most examples in a forward pass; null: all."""
    max_nonfinite: Share = 0.5
    """A step is skipped in which a larger share of the slopes is not finite; below that these count as 0."""

    def unsuited(self, wrapper: Wrapper) -> str:
        """See `DirectStep.unsuited`."""
        return "it has no sigma; take relative_sigma off, or use spsa" if isinstance(wrapper, RelativeSigma) else ""

    @property
    def forwards(self) -> int:
        """One a tangent."""
        return self.tangents

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """See `DirectStep.keeps`; and the largest tangent in float32."""
        return super().keeps(shapes) | self.passing(shapes)

    def passing(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """See `LearningRate.passing`: the tangent."""
        return {"tangent": max((4 * prod(shape) for shape in shapes.values()), default=0)}
