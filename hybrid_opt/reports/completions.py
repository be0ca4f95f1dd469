"""What members wrote for their rewards, and what became of it. Next: `decisions.py`.

One idea: a mean reward can rise for the wrong reason (one function of several, empty answers, errors), so what it is made of is shown.
"""

from collections.abc import Collection, Iterable

from hybrid_opt.reports.records import Run
from hybrid_opt.reports.statistic_panels import Chosen, Statistic, names_of, statistic_of
from hybrid_opt.run_files.summary import COUNTED

COMPLETIONS = {
    "completion_tokens": Statistic("Completion length", "tokens", from_zero=True),
    "finished": Statistic("Completions that ended by themselves", "share", from_zero=True),
    "reward_errors": Statistic("Rewards that went wrong", "rewards", from_zero=True),
}
OTHERS = (
    *("snr", "gradient_norm", "cosine", "rho2", "curvature", "guide_rho2", "fell_back", "trust_factor", "reward"),
    *COUNTED,
)
"""Statistics that are of no reward function."""
MEANING = (
    "Means over all members and examples of a step. A reward function's rewards are shown before they are weighted."
)


def writes(statistics: Collection[str]) -> bool:
    """Whether these are statistics of an estimator whose members write completions."""
    return "completion_tokens" in statistics


def completions_of(runs: Iterable[Run]) -> Chosen:
    """What some of the runs have recorded: each reward function (if there are several), then the completions; errors only if any."""
    runs = list(runs)
    found = names_of(runs)
    if not writes(found):
        return {}
    functions = {n: _function(n) for n in found if n not in (*COMPLETIONS, *OTHERS)}
    shown = {name: statistic for name, statistic in COMPLETIONS.items() if name in found}
    if not any(errors_of(run) for run in runs):
        shown.pop("reward_errors", None)
    return functions | shown


def errors_of(run: Run) -> int:
    """Rewards that went wrong, in all steps."""
    return int(sum(sum(values) for _, values in statistic_of(run, "reward_errors").values()))


def _function(name: str) -> Statistic:
    return Statistic(f"Reward function {name.rpartition(':')[2]}", "mean reward (higher is better)")
