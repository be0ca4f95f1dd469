"""Options of `align`, the projection of the gradient onto a step's directions. Next: `fzoo.py`."""

from typing import Literal

from hybrid_opt.config.probing import Probing
from hybrid_opt.config.strict import PositiveInt
from hybrid_opt.config.wrappers import RelativeSigma, Wrapper


class Align(Probing):
    """The gradient's projection onto the span of q random directions, by least squares from the slopes along them.

    2 q forward passes a step, and the noise is drawn once more to take the inner products of directions; no memory. Of the same slopes as
    `spsa`'s, whose mean weighs what directions have in common twice: the mean square error is |g|^2 times 1 - q/n for n values, never more
    than that of no step at all, where the mean's is (n + 1)/q. The estimate is short, |g| sqrt(q/n), so the
    learning_rate is about n/q times that of `spsa`.
    """

    type: Literal["align"]
    pairs: PositiveInt = 8
    """Number of directions q, not more than values that are moved."""

    def unsuited(self, wrapper: Wrapper) -> str:
        """See `DirectStep.unsuited`."""
        if isinstance(wrapper, RelativeSigma):
            return (
                "it projects onto the directions that it evaluates, and relative_sigma adds up others than it evaluates along; take "
                "relative_sigma off, or use spsa"
            )
        return super().unsuited(wrapper)

    @property
    def forwards(self) -> int:
        """Two a pair."""
        return 2 * self.pairs
