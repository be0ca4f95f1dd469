"""The schedule that gives long examples to one estimator and short ones to another (Addax). Next: `schedule.py`.

One idea: what backprop takes in memory grows with the longest example of its batch, and what ES takes hardly does, so each gets the examples
that suit it, in the same step.
"""

from typing import Literal

from pydantic import model_validator
from typing_extensions import Self

from hybrid_opt.config.strict import Fraction, PositiveInt, Strict


class ByLength(Strict):
    """In each step one estimator on examples of more than `length_threshold` tokens, and another on the rest; their estimates are added,
    `alpha g_long + (1 - alpha) g_short` (Addax, arXiv 2410.06441).

    Both have batches of their own, drawn from the long and from the short examples of the training data. A batch that a loop of one's own
    passes to `step` is split instead; where it has no long or no short examples, the other estimator acts alone with its weight as it is.
    """

    type: Literal["by_length"]
    long: str
    """Name of the estimator for long examples, such as `es`."""
    short: str
    """Name of the estimator for the others, such as `backprop`."""
    length_threshold: PositiveInt | Literal["auto"]
    """Most tokens of a short example, prompt and completion together. `auto`: the most with which steps of backprop stay within
    `training.memory_budget`, measured before the run; its `run.yaml` then has the number."""
    alpha: Fraction = 0.01
    """Weight of the estimate on long examples."""
    long_batch_size: PositiveInt | None = None
    """Long examples in a step; left out: `training.batch_size`."""
    skip_long: bool = False
    """Leave long examples out, to see what they bring: the other estimator acts alone, with its weight as it is."""

    @model_validator(mode="after")
    def _are_different(self) -> Self:
        if self.long == self.short:
            raise ValueError(f"long and short are both {self.long!r}; name two estimators, or use type: single")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each estimator that acts."""
        return ({} if self.skip_long else {self.long: self.alpha}) | {self.short: 1 - self.alpha}
