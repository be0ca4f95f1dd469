"""Many independent estimates of a known gradient. Next: `errors.py`.

One idea: whatever is asked of an estimate a of the gradient g follows from `<a, g>` and `|a|^2`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from hybrid_opt.config.estimators import Estimator as EstimatorConfig
from hybrid_opt.estimators.build import build_estimator
from hybrid_opt.estimators.contract import Cost, Estimate, Estimator
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.studies.verify.known_losses import Known, LinearLoss

DENSE = {"type": "dense"}
"""Dense Gaussian noise."""


@dataclass(frozen=True)
class Trials:
    """How often to measure, and with which noise."""

    seed: int = 0
    share: float = 1.0
    """Of the number of repeats that each check asks for; fewer give wider intervals."""

    def repeats(self, full: int) -> range:
        """Numbers of repeats."""
        return range(max(20, round(full * self.share)))

    def key(self, repeat: int) -> StepKey:
        """The key of a repeat's estimate."""
        return StepKey(self.seed, repeat, "verify")

    def along_and_squared(
        self, full: int, known: Known, estimator: Estimator, before: Callable[[], None] | None = None
    ) -> Tensor:
        """`<a, g> / |g|^2` and `|a|^2 / |g|^2` of independent estimates a of the known gradient g, (repeats, 2) float64.

        Args:
            before: called before each estimate.
        """
        g, rows = known.loss.gradient().double(), []
        for repeat in self.repeats(full):
            if before:
                before()
            a = known.read(estimated(estimator, known, self.key(repeat))[0]).double()
            rows.append(torch.stack([a @ g, a @ a]))
        return torch.stack(rows) / (g @ g)

    def of_linear(self, full: int, **options: Any) -> Tensor:
        """`along_and_squared` of an estimator with these options, for a linear loss of 48 values."""
        return self.along_and_squared(full, Known(LinearLoss()), estimator_of(**options))


def estimator_of(**options: Any) -> Estimator:
    """The estimator that a schedule file with these options would use; a perturbation of size 1 unless `sigma` is given."""
    sigma = {} if options["type"] in ("forward_gradient", "backprop") else {"sigma": 1.0}
    return build_estimator(TypeAdapter(EstimatorConfig).validate_python({"learning_rate": 1.0, **sigma, **options}))


def estimated(estimator: Estimator, known: Known, key: StepKey) -> tuple[Estimate, Cost]:
    """One estimate."""
    return estimator.estimate(known.engine, known.objective, known.batch, known.names, key)
