"""Who is told of a run's events, the plainest ways to show them, and the summary table. Next: `dashboard.py`."""

from collections.abc import Iterable
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from hybrid_opt.run_files.summary import Summary, told_counts
from hybrid_opt.training.goal import goal_of, own_losses, shown


class Display(Protocol):
    """Is told of a run's events, from `start` to `stop`; `say` may come at any time."""

    def start(
        self,
        step: int,
        steps: int | None,
        metrics: Iterable[dict[str, Any]] = (),
        evaluations: Iterable[dict[str, Any]] = (),
    ) -> None:
        """The run begins, or goes on, at a step.

        Args:
            steps: how many there will be, None where a budget decides.
            metrics: lines of `metrics.jsonl` so far, of a run that goes on; they can be read several times, one at a time.
            evaluations: the same of `evaluations.jsonl`.
        """
        ...

    def stepped(self, row: dict[str, Any], done: float) -> None:
        """A step was taken: its line of `metrics.jsonl`, and how much of the run is done (1: all)."""
        ...

    def evaluated(self, step: int, measures: dict[str, float]) -> None:
        """The model was evaluated after so many steps."""
        ...

    def say(self, text: str) -> None:
        """Something worth a line."""
        ...

    def stop(self) -> None:
        """The run ends, however it ends, even before it began."""
        ...


class Silence:
    """Shows nothing."""

    def start(self, step: int, steps: int | None, metrics: Any = (), evaluations: Any = ()) -> None:
        """Nothing."""

    def stepped(self, row: dict[str, Any], done: float) -> None:
        """Nothing."""

    def evaluated(self, step: int, measures: dict[str, float]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class Displays:
    """Several displays as one."""

    def __init__(self, *displays: Display) -> None:
        self.displays = displays

    def start(self, *begun: Any) -> None:
        """Tell each of them."""
        for display in self.displays:
            display.start(*begun)

    def stepped(self, row: dict[str, Any], done: float) -> None:
        """Tell each of them."""
        for display in self.displays:
            display.stepped(row, done)

    def evaluated(self, step: int, measures: dict[str, float]) -> None:
        """Tell each of them."""
        for display in self.displays:
            display.evaluated(step, measures)

    def say(self, text: str) -> None:
        """Tell each of them."""
        for display in self.displays:
            display.say(text)

    def stop(self) -> None:
        """Tell each of them."""
        for display in self.displays:
            display.stop()


class Lines:
    """Prints about ten lines in a run: step, who acts, loss (or reward), learning rates and tokens a second; for files and pipes."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.tenths, self.evaluations, self.done = 0, 0, 0.0

    def start(self, step: int, steps: int | None, metrics: Any = (), evaluations: Any = ()) -> None:
        """Nothing."""

    def stepped(self, row: dict[str, Any], done: float) -> None:
        """Print a line if another tenth of the run is done."""
        self.done = done
        if int(10 * done) > self.tenths:
            self.tenths = int(10 * done)
            self.say(f"step {row['step'] + 1}: {_status(row)}")

    def evaluated(self, step: int, measures: dict[str, float]) -> None:
        """Print the measures, unless there have been many."""
        self.evaluations += 1
        if self.done >= 1 or is_told(self.evaluations):
            self.say(evaluation_line(step, measures))

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Nothing."""


def is_told(number: int) -> bool:
    """Whether the evaluation of that number, from 1, is worth a line: of the first 99 each, then of 900 every tenth, of 9,000 every
    hundredth, and so on, so that a long run does not fill a disk or a screen; all are in `evaluations.jsonl`."""
    return number % 10 ** max(0, len(str(number)) - 2) == 0


def _status(row: dict[str, Any]) -> str:
    rates = " ".join(f"{rate:.2g}" for rate in row["learning_rates"].values())
    speed = f"  {row['tokens'] / row['seconds']:,.0f} tok/s" if row["tokens"] else ""
    goal = goal_of(row)
    reached = [] if row[goal] is None else [f"{goal} {row[goal]:.4f}  "]
    reached += [f"own {what} {value:.4f}  " for what, value in own_losses(row).values()]
    return f"{'+'.join(row['weights']):<12} {''.join(reached)}lr {rates}{speed}"


def evaluation_line(step: int, measures: dict[str, float]) -> str:
    """`after 16 steps: loss 0.3430, accuracy 0.8400`."""
    return f"after {step} steps: " + ", ".join(f"{name} {value:.4f}" for name, value in shown(measures).items())


def summary_table(summary: Summary) -> Table:
    """Before and after, then a row for each estimator, and below it what was counted."""
    names = shown(summary.before)
    title = ", ".join(f"{n} {summary.before[n]:.4g} -> {summary.after[n]:.4g}" for n in names if n in summary.after)
    counted = ((name, told_counts(s.steps, s.counts)) for name, s in summary.estimators.items())
    table = Table(
        title=f"{summary.steps} steps: {title or 'no validation rows'}",
        title_justify="left",
        caption="\n".join(f"{name}: {told}" for name, told in counted if told) or None,
        caption_justify="left",
        min_width=60,
    )
    gain = "reward gain" if summary.goal == "reward" else "loss decrease"
    for column in ("estimator", "steps", "forwards", "backwards", "tokens", "seconds", gain):
        table.add_column(column, justify="left" if column == "estimator" else "right")
    for name, s in summary.estimators.items():
        counts = (f"{count:,}" for count in (s.steps, s.forwards, s.backwards, s.tokens))
        table.add_row(name, *counts, f"{s.seconds:.1f}", "" if s.loss_decrease is None else f"{s.loss_decrease:+.4f}")
    for who, decrease in summary.shared_loss_decrease.items():
        table.add_row(who, "", "", "", "", "", f"{decrease:+.4f}")
    return table
