"""A run on a terminal while it goes on. Next: `dashboard_lines.py`, what stands there.

One idea: training only notes numbers; a thread of its own draws them, at most four times a second, so neither waits for the other.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hybrid_opt.config.training import Budget
from hybrid_opt.display.dashboard_lines import dashboard_lines
from hybrid_opt.display.progress import Display, Lines, Silence, evaluation_line, is_told
from hybrid_opt.display.run_so_far import Clock, RunSoFar
from hybrid_opt.run_files.metrics import measures_of

Choice = Literal["auto", "dashboard", "lines", "none"]
PAUSE = 0.25
"""Seconds between two drawings, at least."""
IDLE = 1.0
"""Seconds between two drawings while nothing happens but time."""


def display_for(choice: Choice, console: Console | None = None, budget: Budget | None = None) -> Display:
    """The display of that name; auto: the dashboard on a terminal that can show it, lines elsewhere."""
    console = console or Console()
    if choice == "auto":
        able = console.is_terminal and not console.is_dumb_terminal and not console.options.ascii_only
        choice = "dashboard" if able else "lines"
    if choice == "none":
        return Silence()
    return Dashboard(console, budget) if choice == "dashboard" else Lines(console)


class Dashboard:
    """Progress, who acts, losses, and a row for each estimator, below the lines that are said.

    Args:
        budget: what the run may spend, if that ends it.
    """

    def __init__(self, console: Console | None = None, budget: Budget | None = None) -> None:
        self.console = console or Console()
        self.run = RunSoFar(budget)
        self.clock = Clock(time.monotonic(), fresh=True)
        self.said: deque[str] = deque(maxlen=100)
        self.lock = threading.RLock()  # taken twice where a signal's handler says something
        self.stopping = threading.Event()
        self.painter: threading.Thread | None = None
        self.changed, self.drawn_at, self.drawn_width = False, 0.0, 0
        self.evaluations = 0

    def start(
        self,
        step: int,
        steps: int | None,
        metrics: Iterable[dict[str, Any]] = (),
        evaluations: Iterable[dict[str, Any]] = (),
    ) -> None:
        """Show what there is, and begin to draw."""
        for row in metrics:
            self.run.add(row)
        for row in evaluations:
            self.run.add_evaluation(row["step"], measures_of(row))
        self.run.step, self.run.steps = step, steps
        self.clock = Clock(time.monotonic(), fresh=step == 0)
        self._open()
        self._draw()
        self.painter = threading.Thread(target=self._paint, name="dashboard", daemon=True)
        self.painter.start()

    def stepped(self, row: dict[str, Any], done: float) -> None:
        """Note the step."""
        with self.lock:
            self.run.add(row)
            self.run.done = done
            self.clock.stepped(time.monotonic(), done)
            self.changed = True

    def evaluated(self, step: int, measures: dict[str, float]) -> None:
        """Note the measures, and say them, unless there have been many."""
        with self.lock:
            self.run.add_evaluation(step, measures)
            self.evaluations += 1
            self.changed = True
        if self.run.done >= 1 or is_told(self.evaluations):
            self.say(evaluation_line(step, measures))

    def say(self, text: str) -> None:
        """Print a line above the dashboard."""
        with self.lock:
            self.said.append(text)
            self._print(text)

    def stop(self) -> None:
        """Leave the last state on the terminal."""
        if self.painter is None:
            return
        self.stopping.set()
        self.painter.join()
        self.painter = None
        with self.lock:
            self._draw()
            self.live.stop()

    def _paint(self) -> None:
        while not self.stopping.wait(PAUSE):
            with self.lock:
                if self.changed or self._is_cut() or time.monotonic() - self.drawn_at >= IDLE:
                    self._draw()

    def _draw(self) -> None:
        if self._is_cut():
            self._start_over()
        width, height = self.console.size
        lines = dashboard_lines(
            self.run,
            self.clock,
            time.monotonic(),
            max(width - 1, 1),
            max(height - 2, 1),
            colourless=self.console.no_color,
        )
        self.live.update(Text("\n", no_wrap=True, overflow="crop").join(lines), refresh=True)
        self.drawn_width = max(line.cell_len for line in lines)
        self.changed, self.drawn_at = False, time.monotonic()

    def _is_cut(self) -> bool:
        """Whether the terminal has become too narrow for what is on it: it has broken or cut the lines."""
        return self.console.size.width < self.drawn_width

    def _start_over(self) -> None:
        """Where the broken lines are, nobody knows; an empty screen, and what was said last, are known."""
        self.live.transient = True
        self.live.stop()
        self.console.clear()
        for text in list(self.said)[-self.console.size.height // 2 :]:
            self._print(text)
        self._open()

    def _open(self) -> None:
        self.live = Live(
            console=self.console,
            auto_refresh=False,
            # Only what would land on this terminal goes above; a file keeps what is meant for it.
            redirect_stdout=self.console.is_terminal,
            redirect_stderr=self.console.is_terminal and sys.stderr.isatty(),
        )
        self.live.start()

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
