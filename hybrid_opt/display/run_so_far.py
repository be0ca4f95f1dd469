"""The numbers of a running run, as far as the dashboard shows them. Next: `dashboard_lines.py`, which draws them.

One idea: a step costs a few additions and constant memory, however long the run, so that being watched slows nothing down.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hybrid_opt.config.training import Budget
from hybrid_opt.run_files.summary import Share
from hybrid_opt.training.goal import goal_of

POINTS = 512
"""Most points that are kept of a curve."""
LATELY = 400
"""Steps of which it is kept who acted."""
SMOOTHING = 0.9
"""How much of the smoothed value stays in a step."""


class Curve:
    """The course of a value; when it has too many points, each two become their mean."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self.each, self.sum, self.count = 1, 0.0, 0

    def add(self, value: float) -> None:
        """One more value."""
        self.sum, self.count = self.sum + value, self.count + 1
        if self.count == self.each:
            self.points.append(self.sum / self.count)
            self.sum, self.count = 0.0, 0
        if len(self.points) == POINTS:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
            self.each *= 2

    def means(self) -> list[float]:
        """The points, with the mean of what has come since the latest."""
        return [*self.points, self.sum / self.count] if self.count else self.points


@dataclass
class EstimatorSoFar:
    """One estimator's totals and latest values."""

    totals: Share = field(default_factory=Share)
    learning_rate: float = 0.0
    loss: float | None = None
    """Not of an estimator that maximises a reward; that is among its statistics."""
    statistics: dict[str, float] = field(default_factory=dict)


class RunSoFar:
    """What has happened in a run until now.

    Args:
        budget: what it may spend, if that ends it.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        ((self.currency, self.limit),) = (budget.model_dump(exclude_none=True) if budget else {"": 0}).items()
        self.step, self.steps, self.done = 0, None, 0.0
        self.spent = 0.0
        self.goal = "loss"
        self.course = Curve()
        self.reached: float | None = None
        self.smoothing, self.left = 0.0, 1.0
        self.actors: deque[tuple[str, ...]] = deque(maxlen=LATELY)
        self.estimators: dict[str, EstimatorSoFar] = {}
        self.recent: deque[tuple[int, float]] = deque(maxlen=20)
        self.peak_memory = 0
        self.first: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.evaluated_at = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`."""
        self.step = row["step"] + 1
        self.goal = goal_of(row)
        if (value := row[self.goal]) is not None:  # otherwise it was not evaluated
            self._add_value(value)
        self.actors.append(tuple(row["weights"]))
        self.recent.append((row["tokens"], row["seconds"]))
        self.peak_memory = max(self.peak_memory, row["peak_memory_bytes"])
        self.spent += row.get(self.currency, 0.0)
        for name, part in row["parts"].items():
            self._add_part(name, part, row)

    def _add_value(self, value: float) -> None:
        self.reached = value
        self.course.add(value)
        self.smoothing = SMOOTHING * self.smoothing + (1 - SMOOTHING) * value
        self.left *= SMOOTHING

    def _add_part(self, name: str, part: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        known = self.estimators.setdefault(name, EstimatorSoFar())
        known.totals.add(part)
        known.learning_rate = row["learning_rates"][name]
        known.loss = None if "reward" in part["statistics"] else row["losses"][name]
        known.statistics |= part["statistics"]

    def add_evaluation(self, step: int, measures: Mapping[str, float]) -> None:
        """What the model was measured to be worth after `step` steps."""
        self.first = self.first or dict(measures)
        self.latest, self.evaluated_at = dict(measures), step

    @property
    def smoothed(self) -> float:
        """Running mean of the loss or reward, without the zero that it started from."""
        return self.smoothing / (1 - self.left)

    @property
    def tokens_per_second(self) -> float:
        """Over the latest steps."""
        return sum(tokens for tokens, _ in self.recent) / max(sum(seconds for _, seconds in self.recent), 1e-9)


class Clock:
    """Time since the start of this session, and what is left by the pace of it."""

    def __init__(self, now: float, fresh: bool) -> None:
        self.begun = now
        self.from_ = (now, 0.0) if fresh else None
        self.to = (now, 0.0)

    def stepped(self, now: float, done: float) -> None:
        """So much is done by now."""
        self.from_ = self.from_ or (now, done)
        self.to = (now, done)

    def left(self, now: float) -> float | None:
        """Seconds until all is done; None: nobody knows yet."""
        if self.from_ is None or self.to[1] <= self.from_[1]:
            return None
        pace = (self.to[0] - self.from_[0]) / (self.to[1] - self.from_[1])
        return max(0.0, pace * (1 - self.to[1]) - (now - self.to[0]))
