"""Panels of peak memory over steps. Next: `update_norms.py`.

One idea: memory is what tells ES from backprop, so each step's peak is drawn in the colour of who acted.
"""

from collections.abc import Sequence

from hybrid_opt.reports.content import Group, Key, Plot, Series
from hybrid_opt.reports.keys import actor_keys
from hybrid_opt.reports.records import Run, Step
from hybrid_opt.reports.thinning import bin_size, bins_of, thinned, thinning_note
from hybrid_opt.reports.wording import known

EACH = "The most memory used during each step, by who acted."
SO_FAR = "The most memory used so far, as older versions recorded it: it cannot fall, whoever acts."


def memory_group(run: Run) -> Group | None:
    """One panel; None if no memory was recorded."""
    steps = [step for step in run.steps if known(step.peak_memory_bytes)]
    if not steps:
        return None
    keys, size = actor_keys(step.actor for step in steps), bin_size(len(steps))
    series = tuple(_series(steps, actor, key, size) for actor, key in keys.items())
    panel = Plot("memory", "Peak memory", "step", "MB", series, from_zero=True)
    told = EACH if steps[0].forward_equivalents is not None else SO_FAR
    return Group("", (panel,), tuple(keys.values()), told + thinning_note(size))


def _series(steps: Sequence[Step], actor: str, key: Key, size: int) -> Series:
    own = [step for step in steps if step.actor == actor]
    return thinned(key, [step.number + 1 for step in own], [step.peak_memory_bytes / 1e6 for step in own], size)


def memory_of_arms(runs: dict[str, Run], keys: dict[str, Key], name: str) -> Plot | None:
    """One line for each arm; None if no run recorded memory. Of many steps a bin keeps the most."""
    lines = (
        _most(keys[arm], [step for step in run.steps if known(step.peak_memory_bytes)]) for arm, run in runs.items()
    )
    series = tuple(line for line in lines if line.x)
    return Plot(name, "Peak memory", "step", "MB", series, from_zero=True) if series else None


def _most(key: Key, steps: Sequence[Step]) -> Series:
    size = bin_size(len(steps), most=80)
    bins = bins_of(steps, size)
    peaks = tuple(max(step.peak_memory_bytes for step in part) / 1e6 for part in bins)
    return Series(key, tuple(part[0].number + 1.0 for part in bins), peaks)
