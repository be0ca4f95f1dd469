"""The factor of an arm's learning rates with the lowest loss. Next: `results.py`.

One idea: a search sees a function from a factor to a loss, and asks it for the same factors each time it is run, so a search that was
stopped goes on by being run again.
"""

import math
import warnings
from collections.abc import Callable

from hybrid_opt.config.study import LearningRateGrid, LearningRateSampling
from hybrid_opt.errors import UserError

LossWith = Callable[[float], float | None]
"""Loss at the budget with a factor: infinite where the run failed, None where it was interrupted (or tells no loss)."""


def search_factor(search: LearningRateGrid | LearningRateSampling, loss_with: LossWith) -> float | None:
    """The best factor; None if the search was interrupted or all runs failed."""
    if isinstance(search, LearningRateGrid):
        losses = {}
        for factor in search.factors:
            if (loss := loss_with(factor)) is None:
                return None
            losses[factor] = loss
    else:
        losses = _sample(search, loss_with)
    best = min(losses, key=losses.__getitem__, default=None)
    return best if best is not None and math.isfinite(losses[best]) else None


def check_search(search: LearningRateGrid | LearningRateSampling | None) -> None:
    """Raise UserError if the search needs a package that is not there."""
    if isinstance(search, LearningRateSampling):
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise UserError(
                "learning_rates: type optuna needs the package optuna; run pip install 'hybrid-opt[search]', or write type: grid"
            ) from None


def _sample(search: LearningRateSampling, loss_with: LossWith) -> dict[float, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=min(4, search.trials // 2 + 1))
    )
    losses: dict[float, float] = {}
    for _ in range(search.trials):
        trial = study.ask()
        # Rounded, so that the factor in a folder's name is the factor.
        factor = float(f"{trial.suggest_float('factor', search.low, search.high, log=True):.6g}")
        if (loss := loss_with(factor)) is None:
            return {}
        losses[factor] = loss
        if math.isfinite(loss):
            study.tell(trial, loss)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return losses
