"""How a run stands, from its folder alone. Next: `../cli/watching.py`.

One idea: everything is read from files that are there anyway, so asking costs a run nothing, and a run that was killed can be asked too.
"""

import time
from collections import deque
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from hybrid_opt.config.training import Budget
from hybrid_opt.display.run_so_far import Clock, RunSoFar
from hybrid_opt.errors import UserError
from hybrid_opt.recovery.checkpoint import base_of, checkpoints, step_of
from hybrid_opt.reports.wording import duration
from hybrid_opt.run_files import messages
from hybrid_opt.run_files.metrics import measures_of
from hybrid_opt.run_files.presence import is_alive, process_of, who
from hybrid_opt.run_files.run_folder import RunFolder


def status_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """What there is to tell of a run: pairs of a word and what belongs to it.

    Raises:
        UserError: the folder holds no run, or a file in it is damaged.
    """
    folder = RunFolder(path)
    process = process_of(folder.path)
    if not (process or folder.metrics.exists() or folder.config.exists()):
        raise UserError(f"{folder.path}: holds no run; name the output folder of hybrid-opt train")
    alive = is_alive(folder.path)
    yield "run", _state(folder, alive, process)
    yield from _steps(folder, process, bool(alive))
    yield from _saved(folder)
    yield from _evaluated(folder)
    yield from _said(folder)


def _steps(folder: RunFolder, process: dict[str, Any], is_alive: bool) -> Iterator[tuple[str, str]]:
    """How far the run has come, at what pace, and when it will end at this process's pace."""
    steps, begun, loss = process.get("steps"), 0.0, None
    run = RunSoFar(Budget(**process["budget"]) if process.get("budget") else None)
    for row in folder.recorded()[0]:
        run.add(row)
        loss = row["loss"]
        if run.step <= process.get("step", 0):
            begun = _done(run, steps)
    done, of = _done(run, steps), f" of {steps:,}" if steps else ""
    ago = f", the latest {_ago(folder.metrics)}" if run.step else ""
    shown = "" if loss is None else f", loss {loss:.4g}"
    yield "step", f"{run.step:,}{of} ({done:.0%} of the run){shown}{ago}"
    if run.recent:
        seconds = sum(seconds for _, seconds in run.recent) / len(run.recent)
        yield "rate", f"{seconds:.3g} s a step, over the latest {len(run.recent)}"
    if is_alive and done < 1:
        clock = Clock(process["began"], fresh=False)
        clock.stepped(process["began"], begun)
        clock.stepped(time.time(), done)
        if (left := clock.left(time.time())) is not None:
            yield "end", f"in about {duration(left)}, at {datetime.fromtimestamp(time.time() + left):%Y-%m-%d %H:%M}"


def _done(run: RunSoFar, steps: int | None) -> float:
    """How much of the run is done, from 0 to 1."""
    return min(1.0, max(run.step / steps if steps else 0.0, run.spent / run.limit if run.limit else 0.0))


def _state(folder: RunFolder, alive: bool | None, process: dict[str, Any]) -> str:
    if finished := folder.finished():
        return f"finished after {finished['steps']:,} steps"
    if alive:
        return f"alive: {who(process)}, for {duration(time.time() - process['began'])}"
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
    return f"{duration(time.time() - file.stat().st_mtime)} ago"
