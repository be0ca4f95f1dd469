"""What a report is about: a run or a study, as plain values. Next: `reading.py`, which makes them from files.

One idea: whatever a folder lacks is None or empty here, and every section says for itself what it misses.
"""

from dataclasses import dataclass, field
from typing import Any

from hybrid_opt.studies.goal import compared_by


@dataclass(frozen=True)
class Step:
    """A line of `metrics.jsonl`."""

    number: int
    weights: dict[str, float]
    """Of each estimator that acted."""
    loss: float | None
    """Of the training batch; None if the step evaluated nothing."""
    forwards: float
    backwards: float
    tokens: float
    seconds: float
    forward_equivalents: float | None
    peak_memory_bytes: float | None
    parts: dict[str, dict[str, Any]]
    """Costs and statistics by estimator."""
    update_norms: dict[str, dict[str, float]] | None
    """Norm of the change of each layer by who moved it; None if it was not recorded."""
    reward: float | None = None
    """Of the training batch, where the run's objective is a reward, whose negative is the loss."""
    own: dict[str, tuple[str, float]] = field(default_factory=dict)
    """By estimators that minimise something else: `loss` or `reward`, and its value."""
    decision: str | None = None
    """What the schedule decided before it by signals, and why."""
    account: dict[str, dict[str, float]] | None = None
    """What was weighed for that, by estimator."""

    def reached(self, goal: str) -> float | None:
        """The loss or the reward, as `Run.goal` says."""
        return self.reward if goal == "reward" else self.loss

    @property
    def actor(self) -> str:
        """Who acted, as one name: `es`, `es + backprop`."""
        return " + ".join(self.weights)


@dataclass(frozen=True)
class Evaluation:
    """A line of `evaluations.jsonl`; the totals count training alone, from the start of the run."""

    step: int
    measures: dict[str, float]
    seconds: float
    tokens: float
    forward_equivalents: float | None


@dataclass(frozen=True)
class Run:
    """One training run, finished or not."""

    title: str
    config: dict[str, Any]
    """The resolved configuration; empty for a run that was built in Python."""
    config_text: str
    machine: dict[str, Any]
    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]
    summary: dict[str, Any]
    """Empty while the run is under way, or if it was interrupted."""
    remarks: tuple[str, ...]
    """What the folder lacks, in sentences."""
    goal: str = "loss"
    """Name of the run's objective among its measures: `reward` where it is one, else `loss`."""


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    task: str
    budget: str
    arm: str
    seed: int
    status: str
    """finished, failed, interrupted or waiting."""
    error: str | None
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True)
class Study:
    """A comparison of arms over tasks, budgets and seeds."""

    title: str
    description: str
    reference: str | None
    metric: str | None
    metric_better: str
    """higher or lower."""
    tasks: tuple[str, ...]
    budgets: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: tuple[StudyRun, ...]
    details: dict[tuple[str, str, str], Run]
    """By task, budget and arm: the run of the first seed that has recorded steps."""
    summary: tuple[dict[str, Any], ...]
    """Rows of `summary.csv`; numbers, True, False, texts, and None for an empty cell."""
    results: tuple[dict[str, Any], ...]
    """Rows of `results.csv`."""
    config_text: str
    remarks: tuple[str, ...]

    @property
    def groups(self) -> tuple[tuple[str, str], ...]:
        """Pairs of task and budget; arms are compared within each."""
        return tuple((task, budget) for task in self.tasks for budget in self.budgets)

    def runs_of(self, task: str, budget: str, arm: str) -> tuple[StudyRun, ...]:
        """The runs of an arm, one a seed."""
        return tuple(run for run in self.runs if (run.task, run.budget, run.arm) == (task, budget, arm))

    def goal_of(self, task: str, budget: str) -> str:
        """The measure in which the arms are compared: `reward` where all of them have one, else `loss`."""
        rows = self.summary_of(task, budget).values()
        if any(row.get("loss") is not None for row in rows):
            return compared_by(rows)
        goals = {run.goal for (*group, _), run in self.details.items() if group == [task, budget]}
        return "reward" if goals == {"reward"} else "loss"

    def summary_of(self, task: str, budget: str) -> dict[str, dict[str, Any]]:
        """Rows of the summary by arm."""
        return {row["arm"]: row for row in self.summary if (row["task"], row["budget"]) == (task, budget)}
