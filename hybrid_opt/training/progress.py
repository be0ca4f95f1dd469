"""What a run shows in the terminal: a progress bar, evaluations, and the summary table. Next: `curves.py`."""

from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hybrid_opt.training.summary import Summary


class Display(Protocol):
    """Is told of a run's events."""

    def start(self, step: int, steps: int | None) -> None:
        """The run begins, or goes on, at a step; steps: how many there will be, None where a budget decides."""
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
        """The run ends, however it ends."""
        ...


class Silence:
    """Shows nothing."""

    def start(self, step: int, steps: int | None) -> None:
        """Nothing."""

    def stepped(self, row: dict[str, Any], done: float) -> None:
        """Nothing."""

    def evaluated(self, step: int, measures: dict[str, float]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class ProgressBar:
    """A bar with the step, who acts, loss, learning rate, tokens a second and the time left.

    Without a terminal a line is printed about ten times in a run instead.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self.bar = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.fields[step]}"),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def start(self, step: int, steps: int | None) -> None:
        """Show the bar."""
        self.steps, self.tenths = steps, 0
        self.task = self.bar.add_task("", total=1.0, step=self._of_steps(step), status="")
        self.bar.start()

    def stepped(self, row: dict[str, Any], done: float) -> None:
        """Move the bar."""
        rates = " ".join(f"{rate:.2g}" for rate in row["learning_rates"].values())
        speed = f"  {row['tokens'] / row['seconds']:,.0f} tok/s" if row["tokens"] else ""
        loss = "" if row["loss"] is None else f"loss {row['loss']:.4f}  "
        status = f"{'+'.join(row['weights']):<12} {loss}lr {rates}{speed}"
        self.bar.update(self.task, completed=min(done, 1.0), step=self._of_steps(row["step"] + 1), status=status)
        if not self.console.is_terminal and int(10 * done) > self.tenths:
            self.tenths = int(10 * done)
            self.say(f"step {row['step'] + 1}: {status}")

    def evaluated(self, step: int, measures: dict[str, float]) -> None:
        """Print the measures above the bar."""
        self.say(f"after {step} steps: " + ", ".join(f"{name} {value:.4f}" for name, value in measures.items()))

    def _of_steps(self, step: int) -> str:
        return f"{step}/{self.steps}" if self.steps else f"step {step}"

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the bar as it is."""
        self.bar.stop()


def summary_table(summary: Summary) -> Table:
    """Before and after, then a row for each estimator."""
    names = list(summary.before) or ["loss"]
    title = ", ".join(f"{n} {summary.before[n]:.4g} -> {summary.after[n]:.4g}" for n in names if n in summary.after)
    table = Table(title=f"{summary.steps} steps: {title or 'no validation rows'}", title_justify="left", min_width=60)
    for column in ("estimator", "steps", "forwards", "backwards", "tokens", "seconds", "loss decrease"):
        table.add_column(column, justify="left" if column == "estimator" else "right")
    for name, s in summary.estimators.items():
        counts = (f"{count:,}" for count in (s.steps, s.forwards, s.backwards, s.tokens))
        table.add_row(name, *counts, f"{s.seconds:.1f}", "" if s.loss_decrease is None else f"{s.loss_decrease:+.4f}")
    for who, decrease in summary.shared_loss_decrease.items():
        table.add_row(who, "", "", "", "", "", f"{decrease:+.4f}")
    return table
