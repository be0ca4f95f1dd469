"""The outcome of a run: before, after, and what each estimator contributed. Next: `../display/progress.py`, `curves.py`."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

COUNTED = ("skipped", "nonfinite_members", "tied_pairs", "reward_errors", "examples_left_out")
"""Statistics of an estimate that are numbers of things, so that their sum over steps says something: steps that were skipped because
all members were equally good or too many not finite, those that were not, antithetic pairs that were equally good, rewards that went
wrong, and examples that told nothing."""

TOLD = {
    "skipped": ("step", "skipped, as all members were equally good or too many not finite"),
    "nonfinite_members": ("member", "whose loss was not finite"),
    "tied_pairs": ("pair", "tied"),
    "reward_errors": ("reward", "that went wrong"),
    "examples_left_out": ("example", "left out, as all members agreed"),
}


def counts_of(parts: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Sums of what was counted over an estimator's parts in steps; what no part counts is not there."""
    counts: dict[str, int] = {}
    for statistics in (part.get("statistics") or {} for part in parts):
        for name in COUNTED:
            if name in statistics:
                counts[name] = counts.get(name, 0) + int(statistics[name])
    return counts


def told_counts(steps: int, counts: Mapping[str, int]) -> str:
    """What was counted in an estimator's steps, in words: `1 of 12 steps skipped, ...; 11 pairs tied`; nothing of what never was."""
    told = []
    for name in (name for name in COUNTED if counts.get(name)):
        (thing, what), number = TOLD[name], counts[name]
        of = f"{number:,} of {steps:,} {thing}s" if name == "skipped" else f"{number:,} {thing}{'s' * (number != 1)}"
        told.append(f"{of} {what}")
    return "; ".join(told)


@dataclass
class Share:
    """One estimator's part in a run."""

    steps: int = 0
    """Steps in which it acted."""
    forwards: int = 0
    """Forward passes over a batch."""
    backwards: int = 0
    """Backward passes over a batch."""
    forward_equivalents: float = 0.0
    """Computing, in forward passes over the whole batch (see `Cost`)."""
    tokens: int = 0
    """Tokens of its forward passes."""
    seconds: float = 0.0
    """Time of its estimates; what a step takes otherwise is split evenly among those who act in it."""
    loss_decrease: float | None = None
    """Fall of the probe loss over the turns in which it acted alone; None if it never did, or nothing was probed. Where the run's
    objective is a reward, this is the reward's rise."""
    counts: dict[str, int] = field(default_factory=dict)
    """Sums over its steps of what its estimates count (see `COUNTED`); what was never counted is not there."""

    def add(self, part: Mapping[str, Any]) -> None:
        """One more step, of which this was its part (`parts` in a line of `metrics.jsonl`)."""
        self.steps += 1
        self.forwards += part["forwards"]
        self.backwards += part["backwards"]
        self.forward_equivalents += part["forward_equivalents"]
        self.tokens += part["tokens"]
        self.seconds += part["seconds"]
        for name, count in counts_of([part]).items():
            self.counts[name] = self.counts.get(name, 0) + count


@dataclass
class Summary:
    """The outcome of a run."""

    steps: int
    before: dict[str, float]
    """Measures on the validation rows before the first step; empty without validation."""
    after: dict[str, float]
    """The same after the last step."""
    goal: str = "loss"
    """`reward` where the run's objective is one, whose negative is the loss."""
    estimators: dict[str, Share] = field(default_factory=dict)
    """Each estimator's part."""
    shared_loss_decrease: dict[str, float] = field(default_factory=dict)
    """Fall of the probe loss over turns in which several acted together, such as `es+backprop`."""
    seconds: float = 0.0
    """Time of all steps, without evaluations and probes."""
    peak_memory_bytes: int = 0
    """Most memory used in a step: of the process on CPU, of the device on CUDA."""
    roll_backs: int = 0
    """How often the run went back to its best weights (`training.divergence`)."""
    finished: bool = True
    """False if the run was interrupted and can be resumed."""

    def as_dict(self) -> dict[str, Any]:
        """In plain values, for JSON."""
        return asdict(self)


class Totals:
    """What a summary says of the steps, added up as they come, so that no step need be kept.

    Args:
        rows: lines of `metrics.jsonl`, of a run that goes on.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self.parts: dict[str, Share] = {}
        self.peak_memory_bytes = 0
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """One more line."""
        self.peak_memory_bytes = max(self.peak_memory_bytes, row["peak_memory_bytes"])
        for name, part in row["parts"].items():
            self.parts.setdefault(name, Share()).add(part)

    def shares(self, decrease: Mapping[str, float]) -> dict[str, Share]:
        """Each estimator's part, with its credit of `Attribution`."""
        return {name: replace(share, loss_decrease=decrease.get(name)) for name, share in self.parts.items()}
