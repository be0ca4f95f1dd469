"""One run of a study, in a process of its own. Next: `ablate.py`.

One idea: a run of a study is `hybrid-opt train` on a run file that lies beside its folder, so its memory is its own, it can fail alone, it
can be killed and goes on from its checkpoint, and anybody can repeat it by hand.

    seed-0.yaml    the run file
    seed-0.log     what the process printed
    seed-0/        the run folder
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hybrid_opt.config.loading import differences
from hybrid_opt.config.run import RunFile
from hybrid_opt.errors import UserError
from hybrid_opt.run_files.durable import write_atomically, writing
from hybrid_opt.run_files.run_folder import RunFolder, dump_yaml

Status = Literal["finished", "failed", "interrupted", "waiting"]

PATIENCE = 0.2
"""Seconds between looks at a process."""


@dataclass(frozen=True)
class Outcome:
    """How a run stands."""

    status: Status
    summary: dict[str, Any] | None = None
    """What the run left in `summary.json`, if it finished."""
    error: str | None = None
    """Why it failed, on one line."""


@dataclass(frozen=True)
class Stop:
    """How to end early."""

    requested: Callable[[], bool]
    """When it says True, processes are told to save and leave, and no new one is started."""
    at_once: threading.Event = field(default_factory=threading.Event)
    """When it is set, processes are killed."""


WAITING = Outcome("waiting")


def standing(run: RunFile) -> Outcome:
    """How a run stands that an earlier process may have finished.

    Raises:
        UserError: the folder holds a finished run with other settings.
    """
    folder = RunFolder(run.output)
    summary = folder.finished()
    if summary is None:
        return WAITING
    saved, now = folder.read_config(), run.model_dump(mode="json", exclude_none=True)
    for key, before, after in differences(saved, now):
        if key not in ("output", "training.checkpoint_every", "training.save_model"):
            raise UserError(
                f"output: {folder.path} holds a finished run whose {key} was {before!r}, and the study now says {after!r}; give the "
                "study another output, or start it anew with --overwrite"
            )
    return Outcome("finished", summary)


def train(run: RunFile, *, allow_code: bool = False, threads: int, stop: Stop, lock: int | None = None) -> Outcome:
    """Train a run to its end, from its newest checkpoint if it has one.

    Args:
        allow_code: let it execute the code that the run file names.
        threads: threads of the process.
        stop: looked at again and again.
        lock: a file descriptor that the process keeps open, so that a lock on it is held as long as the process lives.
    """
    folder = RunFolder(run.output)
    file, log = _beside(folder.path, ".yaml"), _beside(folder.path, ".log")
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, dump_yaml(run.model_dump(mode="json", exclude_none=True)))
    goes_on = folder.saved_step() is not None
    options = ["--resume" if goes_on else "--overwrite", *(["--allow-code"] if allow_code else [])]
    command = [sys.executable, "-m", "hybrid_opt", "train", *options, "--", str(file)]
    with log.open("a" if goes_on else "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C comes through us, once
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
            pass_fds=() if lock is None else (lock,),
        )
        _wait(process, stop)
    if process.returncode == 0:
        summary = folder.finished()
        return Outcome("finished", summary) if summary else Outcome("interrupted")
    if process.returncode < 0 and stop.requested():
        return Outcome("interrupted")
    return Outcome("failed", error=_reason(process.returncode, log))


def _wait(process: subprocess.Popen, stop: Stop) -> None:
    told = False
    try:
        while process.poll() is None:
            if stop.requested() and not told:
                process.send_signal(signal.SIGTERM)
                told = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            if stop.at_once.is_set():
                process.kill()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _reason(code: int, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code < 0:
        killed = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{killed}; see {log}"
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit status {code}; see {log}"])[-1]


def _beside(folder: Path, ending: str) -> Path:
    return folder.parent / (folder.name + ending)
