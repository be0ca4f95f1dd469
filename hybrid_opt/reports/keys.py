"""How estimators and arms are drawn, the same in every panel. Next: `timeline.py`.

One idea: colour is never the only sign. Estimators also differ by marker and dashes, arms by dashes and a number.
"""

from collections.abc import Iterable

from hybrid_opt.reports.colours import SERIES
from hybrid_opt.reports.content import Key

MARKERS = "osD^vP*X"
DASHES = ("-", "--", "-.", ":")
FIRST = ("es", "backprop", "es + backprop")
"""These keep their looks in every report."""

EVALUATION = Key("evaluation", "ink", marker="D")


def actor_keys(actors: Iterable[str]) -> dict[str, Key]:
    """A key for each estimator, or for those that act together, in a fixed order."""
    present = dict.fromkeys(actors)
    others = sorted((name for name in present if name not in FIRST), key=lambda name: (name.count("+"), name))
    return {
        name: Key(name, SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)])
        for i, name in enumerate((*FIRST, *others))
        if name in present
    }


def arm_keys(arms: Iterable[str], reference: str | None) -> dict[str, Key]:
    """A key for each arm of a study, numbered in order of display; the reference is drawn in ink."""
    keys, coloured = {}, 0
    for number, arm in enumerate(arms, 1):
        if arm == reference:
            keys[arm] = Key(f"{arm} (reference)", "ink", number=number)
            continue
        dash = DASHES[(coloured + coloured // len(SERIES)) % len(DASHES)]
        keys[arm] = Key(arm, SERIES[coloured % len(SERIES)], dash=dash, number=number)
        coloured += 1
    return keys
