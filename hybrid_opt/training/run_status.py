"""How a run stands, from its folder alone. Next: `../cli/watching.py`.

One idea: everything is read from files that are there anyway, so asking costs a run nothing, and a run that was killed can be asked too.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from hybrid_opt.config.run import Budget
from hybrid_opt.errors import UserError
from hybrid_opt.recovery.checkpoint import base_of, checkpoints, step_of
from hybrid_opt.training import messages
from hybrid_opt.training.metrics import measures_of
from hybrid_opt.training.presence import is_alive, process_of, who
from hybrid_opt.training.run_folder import RunFolder

LATEST = 20
"""Steps of which the rate is told."""


@dataclass
class Progress:
    """What the metrics say; totals by the names of a budget."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    forward_equivalents: float = 0.0
    loss: float | None = None
    latest: list[float] = field(default_factory=list)
    """Seconds of the latest steps."""

    def add(self, row: dict[str, Any]) -> None:
        """One more step."""
        self.step, self.loss = row["step"] + 1, row["loss"]
        for name in ("seconds", "tokens", "forward_equivalents"):
            setattr(self, name, getattr(self, name) + row[name])
        self.latest = [*self.latest[1 - LATEST :], row["seconds"]]

    def share(self, steps: int | None, budget: Budget | None) -> float:
        """How much of the run is done, from 0 to 1."""
        return min(1.0, max([self.step / steps if steps else 0.0, budget.spent(self) if budget else 0.0]))


def status_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """What there is to tell of a run: pairs of a word and what belongs to it.

    Raises:
        UserError: the folder holds no run, or a file in it is damaged.
    """
    folder = RunFolder(path)
    process, metrics = process_of(folder.path), folder.metrics
    if not (process or metrics.exists() or folder.config.exists()):
        raise UserError(f"{folder.path}: holds no run; name the output folder of hybrid-opt train")
    alive, began = is_alive(folder.path), Progress()
    progress = Progress()
    for row in folder.recorded()[0]:
        progress.add(row)
        if row["step"] < process.get("step", 0):
            began.add(row)
    steps, budget = process.get("steps"), Budget(**process["budget"]) if process.get("budget") else None
    done = progress.share(steps, budget)
    yield "run", _state(folder, alive, process)
    of = f" of {steps:,}" if steps else ""
    ago = f", the latest {_ago(metrics)}" if progress.step else ""
    shown = "" if progress.loss is None else f", loss {progress.loss:.4g}"
    yield "step", f"{progress.step:,}{of} ({done:.0%} of the run){shown}{ago}"
    if progress.latest:
        seconds = sum(progress.latest) / len(progress.latest)
        yield "rate", f"{seconds:.3g} s a step, over the latest {len(progress.latest)}"
    share = done - began.share(steps, budget)
    if alive and share > 0 and done < 1:
        left = (1 - done) / share * (time.time() - process["began"])
        yield "end", f"in about {_span(left)}, at {datetime.fromtimestamp(time.time() + left):%Y-%m-%d %H:%M}"
    yield from _saved(folder)
    yield from _evaluated(folder)
    yield from _said(folder)


def _state(folder: RunFolder, alive: bool | None, process: dict[str, Any]) -> str:
    if finished := folder.finished():
        return f"finished after {finished['steps']:,} steps"
    if alive:
        return f"alive: {who(process)}, for {_span(time.time() - process['began'])}"
    if alive is None:
        return f"nobody can tell whether it is alive: this file system has no locks; it was begun by {who(process)}"
    goes_on = folder.saved_step() is not None
    return "not running; " + ("the command with --resume goes on" if goes_on else "and no checkpoint to go on from")


def _saved(folder: RunFolder) -> Iterator[tuple[str, str]]:
    for latest in checkpoints(folder.checkpoints)[:1]:
        try:
            kind = "" if base_of(latest) == latest else ", by the ledger"
        except UserError as error:
            kind = f", damaged: {error}"
        yield "saved", f"after step {step_of(latest):,}, {_ago(latest)}{kind}"


def _evaluated(folder: RunFolder) -> Iterator[tuple[str, str]]:
    for row in deque(folder.recorded()[1], maxlen=1):
        measures = ", ".join(f"{name} {value:.4g}" for name, value in measures_of(row).items())
        yield "evaluated", f"after step {row['step']:,}: {measures}"


def _said(folder: RunFolder) -> Iterator[tuple[str, str]]:
    file = folder.path / messages.NAME
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    for number, line in enumerate(lines[-5:]):
        yield "" if number else "said", line


def _ago(file: Path) -> str:
    return f"{_span(time.time() - file.stat().st_mtime)} ago"


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
