"""Whether a population is large enough for what its losses can tell. Next: `fitness.py`.

One idea: with q pairs of which a share s differ, and whose differences are signal to a share R, the step's part along the true gradient has
a mean of `sqrt(q s R / (1 + R))` standard deviations for a linear loss (the projection of one pair has mean `sigma |g|` and variance
`2 sigma^2 |g|^2 + noise`). A step that goes downhill five times out of six has one standard deviation, `q = (1 + 1/R) / s`.
"""

import math
import warnings

from torch import Tensor

from hybrid_opt.estimators.pairs import odd_and_even

STEPS = 10
"""Steps to look at before a judgement."""


class PopulationWatch:
    """Watches the antithetic losses of a run, and warns once if there are too few pairs.

    `R = 1 - var(even parts) / mean(odd parts^2)`, pooled over steps; see `pair_statistics`.
    """

    def __init__(self) -> None:
        self.steps = self.pairs = self.differ = 0
        self.odd = self.even = 0.0
        self.warned = False

    def see(self, losses: Tensor) -> int:
        """Look at the fitness of a step's members, (members,), the two of a pair side by side, and warn if it is time to.

        Returns:
            How many pairs are tied.
        """
        odd, even = odd_and_even(losses)
        tied = int((odd == 0).sum())
        self.steps, self.pairs, self.differ = self.steps + 1, self.pairs + len(odd), self.differ + len(odd) - tied
        self.odd += odd.square().sum().item()
        self.even += (even - even.mean()).square().sum().item() * len(odd) / max(1, len(odd) - 1)
        if self.steps >= STEPS and not self.warned:
            self._judge(len(odd))
        return tied

    def needed(self) -> int | None:
        """Members with which a step would go downhill five times out of six; None if no number would do."""
        signal = 1 - self.even / self.odd if self.odd else 0.0
        if signal <= 0 or not self.differ:
            return None
        return 2 * math.ceil((1 + 1 / signal) * self.pairs / self.differ - 1e-6)

    def _judge(self, pairs: int) -> None:
        needed = self.needed()
        if needed is not None and needed <= 2 * pairs:
            return
        self.warned = True
        found = f"in {self.steps} steps {self.differ} of {self.pairs} pairs of members differed in their losses"
        if needed is None:
            advice = (
                "and no more than the mean losses of pairs do, so no signal is to be seen: use more examples a step (batch_size), "
                "another sigma, or a reward with more values"
            )
        else:
            advice = f"which is little for this reward: population_size {needed} would make five steps out of six go downhill"
        warnings.warn(f"population_size {2 * pairs}: {found}, {advice}", RuntimeWarning, stacklevel=2)
