"""Which process writes a run folder, if one does. Next: `run_status.py`.

One idea: a process holds a lock on a file as long as it lives, however it ends, so the file says who writes, and the lock whether it
still does.
"""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hybrid_opt.errors import UserError
from hybrid_opt.run_files import locking
from hybrid_opt.run_files.durable import writing

NAME = "process.json"


@contextmanager
def present(folder: Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """Inside, this process writes the folder, which is made if it is not there.

    Args:
        facts: what the file says besides the process.

    Raises:
        UserError: another process writes it.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / NAME).open("a+", encoding="utf-8")
    with file:
        if not _locked(file):
            raise UserError(
                f"output: {folder} is being written by {who(process_of(folder))}; wait for it or stop it, or choose another folder with "
                "output=..."
            )
        own = {"process": os.getpid(), "host": platform.node(), "began": time.time(), **facts}
        with writing(folder / NAME):
            file.truncate(0)
            file.write(json.dumps(own) + "\n")
            file.flush()
        yield


def process_of(folder: Path) -> dict[str, Any]:
    """What the process has said that writes the folder, or wrote it last; empty if none has."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_alive(folder: Path) -> bool | None:
    """Whether a process writes the folder at present; None where the file system cannot tell."""
    if not locking.EXIST:
        return None
    try:
        with (folder / NAME).open("rb") as file:
            return not locking.lock(file, shared=True)
    except FileNotFoundError:
        return False
    except OSError:
        return None


def who(process: Mapping[str, Any]) -> str:
    """A process in words."""
    if "process" not in process:
        return "another process"
    return f"process {process['process']} on {process.get('host', 'another machine')}"


def _locked(file: Any) -> bool:
    """Whether the lock is this process's; where there are no locks, it may be."""
    try:
        return locking.lock(file)
    except OSError:
        return True
