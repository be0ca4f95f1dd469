"""What ES says about its own estimates. Next: `completions.py`, then `memory_panels.py`.

One idea: two statistics need nothing but the members' losses, and two need the exact gradient of the same step beside the estimate.
"""

from collections.abc import Iterable

from hybrid_opt.reports.completions import COMPLETIONS, writes
from hybrid_opt.reports.records import Run
from hybrid_opt.reports.statistic_panels import Chosen, Statistic, names_of

STATISTICS = {
    "snr": Statistic("Signal-to-noise", "variance ratio"),
    "gradient_norm": Statistic("Gradient norm that the probes see", "norm"),
    "curvature": Statistic("Curvature along the directions", "second derivative"),
    "cosine": Statistic("Cosine with the exact gradient", "cosine"),
    "rho2": Statistic("Share of the gradient's energy, rho\u00b2", "rho\u00b2"),
    "guide_rho2": Statistic("Share of the gradient's energy along guides, rho\u00b2", "rho\u00b2"),
    "fell_back": Statistic("Guided steps without guides", "1: none", from_zero=True),
    "trust_factor": Statistic("Learning rate kept to trust", "factor", from_zero=True),
    "tied_pairs": Statistic("Tied pairs", "pairs", from_zero=True),
    "examples_left_out": Statistic("Examples on which members agreed", "examples", from_zero=True),
}
ELSEWHERE = ("reward", "skipped")
"""Statistics that the report shows in other places."""
MEANING = (
    "Signal-to-noise is the variance of the antithetic pairs' odd parts (L+ - L-)/2 over that of their even parts (L+ + L-)/2. "
    "The gradient norm is the root of the mean of ((L+ - L-)/(2 sigma))\u00b2 over the pairs. Rho\u00b2 is the squared cosine."
)
TIES = " Both members of a tied pair are equally good, so the pair says nothing; where all members are, the step is skipped."
NEED_PAIRS = "Signal-to-noise and gradient norm were not recorded: they exist only for ES with antithetic pairs."
NEED_GRADIENT = (
    "Cosine and rho\u00b2 were not recorded: they exist only where ES and backprop act in the same step on the same parameters, "
    "to minimise the same."
)


def chosen_for(runs: Iterable[Run]) -> Chosen:
    """What some of the runs have recorded, the unknown last; of runs that write completions the unknown are reward functions."""
    found = names_of(runs)
    shown = {name: statistic for name, statistic in STATISTICS.items() if name in found}
    others = [] if writes(found) else [name for name in found if name not in (*STATISTICS, *COMPLETIONS, *ELSEWHERE)]
    return shown | {name: Statistic(name.replace("_", " "), "value") for name in others}


def meaning_of(runs: Iterable[Run]) -> str:
    """What the panels show, in words."""
    return MEANING + TIES * ("tied_pairs" in names_of(runs))


def what_is_absent(runs: Iterable[Run]) -> tuple[str, ...]:
    """A sentence for each pair of statistics that no run has."""
    found = set(names_of(runs))
    texts = ((("snr", "gradient_norm"), NEED_PAIRS), (("cosine", "rho2"), NEED_GRADIENT))
    return tuple(text for names, text in texts if not found.intersection(names))
