"""What a run writes down of its steps and evaluations, and shows. Next: `messages.py`, `presence.py`,
`run_folder.py`, `../display/progress.py`, `summary.py`.

One idea: the same rows go to the folder, the display and the totals, so a resumed run that reads its rows knows what it had known.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hybrid_opt.config.training import Budget
from hybrid_opt.display.progress import Display
from hybrid_opt.run_files.curves import draw_curves
from hybrid_opt.run_files.messages import Messages
from hybrid_opt.run_files.metrics import evaluation_row, measures_of
from hybrid_opt.run_files.presence import present
from hybrid_opt.run_files.run_folder import RunFolder
from hybrid_opt.run_files.summary import Summary, Totals
from hybrid_opt.scheduling.signals import Signals


class Journal:
    """Rows of a run.

    Args:
        folder: where they are kept; None: nowhere.
        display: shows them.
        writes: whether this is the process among several that writes.
    """

    def __init__(self, folder: RunFolder | None, display: Display, *, writes: bool) -> None:
        self.folder, self.display = folder, display
        self.writes = writes and folder is not None
        self.messages = Messages(folder.path if self.writes else None, display.say)
        self.before: dict[str, float] = {}
        """Measures on the validation rows before the first step."""
        self.evaluated_at = -1
        """The step of the latest evaluation."""
        self.totals = Totals()

    @contextmanager
    def held(self, steps: int | None, budget: Budget | None, *, resume: bool) -> Iterator[None]:
        """Inside, the folder is this process's; warnings, and an error that ends the run, are kept there.

        Args:
            steps, budget: how long the run is to be.
            resume: whether it goes on from the latest checkpoint.
        """
        if not self.writes:
            yield
            return
        step = (self.folder.saved_step() or 0) if resume else 0
        facts = {"step": step, "steps": steps, "budget": budget and budget.model_dump(exclude_none=True)}
        with present(self.folder.path, facts), self.messages.warnings_kept():
            try:
                yield
            except BaseException as error:
                self.messages.keep(f"ended by {type(error).__name__}: {error}")
                raise

    def say(self, text: str) -> None:
        """Show a line and keep it."""
        self.messages.say(text)

    def start(self, step: int, steps: int | None) -> None:
        """The run begins or goes on; its former rows are shown."""
        self.display.start(step, steps, *(self.folder.recorded() if self.folder else ()))

    def read(self) -> None:
        """Know what the run that goes on has written."""
        metrics, evaluations = self.folder.recorded()
        self.totals = Totals(metrics)
        for row in evaluations:
            self.before = self.before or measures_of(row)
            self.evaluated_at = row["step"]

    def stepped(self, row: dict[str, Any], done: float) -> None:
        """A step was taken."""
        self.totals.add(row)
        if self.writes:
            self.folder.append(self.folder.metrics, row)
        self.display.stepped(row, done)

    def evaluated(self, measures: dict[str, float], signals: Signals) -> None:
        """The model was evaluated after so many steps."""
        self.evaluated_at = signals.step
        if self.writes:
            self.folder.append(self.folder.evaluations, evaluation_row(signals.step, measures, signals))
        self.display.evaluated(signals.step, measures)

    def summary(
        self,
        signals: Signals,
        after: dict[str, float],
        decrease: Mapping[str, float],
        *,
        goal: str,
        roll_backs: int,
        finished: bool,
    ) -> Summary:
        """What has come of the run; of one that is finished it stays in the folder, with the curves.

        Args:
            after: measures after the last step.
            decrease: each estimator's credit of `Attribution`, and that of those who acted together.
        """
        summary = Summary(
            steps=signals.step,
            goal=goal,
            before=self.before,
            after=after,
            estimators=self.totals.shares(decrease),
            shared_loss_decrease={who: amount for who, amount in decrease.items() if "+" in who},
            seconds=signals.seconds,
            peak_memory_bytes=self.totals.peak_memory_bytes,
            roll_backs=roll_backs,
            finished=finished,
        )
        if finished and self.writes:
            draw_curves(*self.folder.recorded(), self.folder.curves)
            self.folder.write_summary(summary.as_dict())
        return summary
