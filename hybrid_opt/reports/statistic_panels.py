"""Panels of the statistics that estimates come with, over steps. Next: `es_statistics.py`, `completions.py`.

One idea: a statistic that nobody has told us of is drawn as well, under its own name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hybrid_opt.reports.content import Key, Plot, Series
from hybrid_opt.reports.keys import actor_keys
from hybrid_opt.reports.loss_panels import spans_decades
from hybrid_opt.reports.records import Run
from hybrid_opt.reports.thinning import bin_size, thinned
from hybrid_opt.reports.wording import known


@dataclass(frozen=True)
class Statistic:
    """How a statistic is drawn."""

    title: str
    label: str
    """Of its axis."""
    from_zero: bool = False
    """Whether the axis begins at zero; otherwise it may be logarithmic."""


Chosen = Mapping[str, Statistic]
"""By name in `metrics.jsonl`."""


def names_of(runs: Iterable[Run]) -> list[str]:
    """All statistics that some step has, in the order of their appearance."""
    parts = (part for run in runs for step in run.steps for part in step.parts.values())
    return list(dict.fromkeys(name for part in parts for name in part.get("statistics") or {}))


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


def panels_of_run(run: Run, chosen: Chosen) -> tuple[Plot, ...]:
    """A panel for each statistic that was recorded, with a line for each estimator."""
    size = bin_size(len(run.steps))
    panels = []
    for name, statistic in chosen.items():
        found = statistic_of(run, name)
        keys = actor_keys(found)
        series = [thinned(keys[who], *found[who], size, form="line") for who in keys]
        panels += [_panel(name, statistic, series)] if series else []
    return tuple(panels)


def panels_of_arms(runs: dict[str, Run], keys: dict[str, Key], name: str, chosen: Chosen) -> tuple[Plot, ...]:
    """The same with a line for each arm, of its first estimator that has the statistic."""
    panels = []
    for own, statistic in chosen.items():
        series = []
        for arm, run in runs.items():
            for steps, values in list(statistic_of(run, own).values())[:1]:
                line = thinned(keys[arm], steps, values, bin_size(len(values), most=80), form="line")
                series.append(Series(line.key, line.x, line.y))
        panels += [_panel(f"{name}_{own}", statistic, series)] if series else []
    return tuple(panels)


def _panel(name: str, statistic: Statistic, series: list[Series]) -> Plot:
    log = not statistic.from_zero and spans_decades(series)
    return Plot(name, statistic.title, "step", statistic.label, tuple(series), log=log, from_zero=statistic.from_zero)
