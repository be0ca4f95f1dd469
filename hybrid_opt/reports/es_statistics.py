"""Panels of what ES says about its own estimates. Next: `memory_panels.py`.

One idea: two statistics need nothing but the members' losses, and two need the exact gradient of the same step beside the estimate.
"""

from collections.abc import Iterable

from hybrid_opt.reports.content import Key, Plot, Series
from hybrid_opt.reports.keys import actor_keys
from hybrid_opt.reports.loss_panels import spans_decades
from hybrid_opt.reports.records import Run
from hybrid_opt.reports.thinning import bin_size, thinned
from hybrid_opt.reports.wording import known

STATISTICS = {
    "snr": ("Signal-to-noise", "variance ratio"),
    "gradient_norm": ("Gradient norm that the probes see", "norm"),
    "cosine": ("Cosine with the exact gradient", "cosine"),
    "rho2": ("Share of the gradient's energy, rho\u00b2", "rho\u00b2"),
}
MEANING = (
    "Signal-to-noise is the variance of the antithetic pairs' odd parts (L+ - L-)/2 over that of their even parts (L+ + L-)/2. "
    "The gradient norm is the root of the mean of ((L+ - L-)/(2 sigma))\u00b2 over the pairs. Rho\u00b2 is the squared cosine."
)
NEED_PAIRS = "Signal-to-noise and gradient norm were not recorded: they exist only for ES with antithetic pairs."
NEED_GRADIENT = "Cosine and rho\u00b2 were not recorded: they exist only where ES and backprop act in the same step on the same parameters."


def statistic_of(run: Run, statistic: str) -> dict[str, tuple[list[int], list[float]]]:
    """Steps (counted from 1) and values by estimator."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for step in run.steps:
        for name, part in step.parts.items():
            value = (part.get("statistics") or {}).get(statistic)
            if known(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(step.number + 1)
                values.append(value)
    return found


def panels_of_run(run: Run) -> tuple[Plot, ...]:
    """A panel for each statistic that was recorded, with a line for each estimator."""
    size = bin_size(len(run.steps))
    panels = []
    for statistic in STATISTICS:
        found = statistic_of(run, statistic)
        keys = actor_keys(found)
        series = [thinned(keys[name], *found[name], size, form="line") for name in keys]
        panels += [_panel(statistic, statistic, series)] if series else []
    return tuple(panels)


def panels_of_arms(runs: dict[str, Run], keys: dict[str, Key], name: str) -> tuple[Plot, ...]:
    """The same with a line for each arm, of its first estimator that has the statistic."""
    panels = []
    for statistic in STATISTICS:
        series = []
        for arm, run in runs.items():
            for steps, values in list(statistic_of(run, statistic).values())[:1]:
                line = thinned(keys[arm], steps, values, bin_size(len(values), most=80), form="line")
                series.append(Series(line.key, line.x, line.y))
        panels += [_panel(f"{name}_{statistic}", statistic, series)] if series else []
    return tuple(panels)


def _panel(name: str, statistic: str, series: list[Series]) -> Plot:
    title, label = STATISTICS[statistic]
    return Plot(name, title, "step", label, tuple(series), log=spans_decades(series))


def what_is_absent(runs: Iterable[Run]) -> tuple[str, ...]:
    """A sentence for each pair of statistics that no run has."""
    found = {
        statistic
        for run in runs
        for step in run.steps
        for part in step.parts.values()
        for statistic in part.get("statistics") or {}
    }
    texts = ((("snr", "gradient_norm"), NEED_PAIRS), (("cosine", "rho2"), NEED_GRADIENT))
    return tuple(text for names, text in texts if not found.intersection(names))
