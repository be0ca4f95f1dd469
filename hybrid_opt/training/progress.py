"""What a run shows in the terminal: a progress bar, evaluations, and the summary table. Next: `curves.py`."""

from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hybrid_opt.training.hybrid_optimizer import StepReport
from hybrid_opt.training.summary import Summary


class Display(Protocol):
    """Is told of a run's events."""

    def start(self, step: int, steps: int) -> None:
        """The run begins, or goes on, at a step."""
        ...

    def stepped(self, report: StepReport) -> None:
        """A step was taken."""
        ...

    def say(self, text: str) -> None:
        """Something worth a line."""
        ...

    def stop(self) -> None:
        """The run ends, however it ends."""
        ...


class Silence:
    """Shows nothing."""

    def start(self, step: int, steps: int) -> None:
        """Nothing."""

    def stepped(self, report: StepReport) -> None:
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
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def start(self, step: int, steps: int) -> None:
        """Show the bar."""
        self.every = max(1, steps // 10)
        self.task = self.bar.add_task("", total=steps, completed=step, status="")
        self.bar.start()

    def stepped(self, report: StepReport) -> None:
        """Move the bar."""
        rates = " ".join(f"{rate:.2g}" for rate in report.learning_rates.values())
        speed = f"  {report.tokens / report.seconds:,.0f} tok/s" if report.tokens else ""
        status = f"{'+'.join(report.weights):<12} loss {report.loss:.4f}  lr {rates}{speed}"
        self.bar.update(self.task, completed=report.step + 1, status=status)
        if not self.console.is_terminal and (report.step + 1) % self.every == 0:
            self.say(f"step {report.step + 1}: {status}")

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
