"""The folder that a study leaves behind. Next: `results.py`.

    study.yaml                      the resolved study
    study.json                      its runs, how each stands, and why it failed
    results.csv, results.parquet    one row a run
    summary.csv                     one row an arm
    runs/TASK/BUDGET/ARM/seed-0/    ordinary run folders, each with its run file and log beside it
    fit/, search/                   runs that chose what an arm gives up for memory, and its learning rates

One idea: the same command on the same folder goes on with the study, so the folder is the study's state, and one process at a time has it.
"""

import json
import os
from pathlib import Path
from typing import Any

from hybrid_opt.errors import UserError
from hybrid_opt.run_files import locking
from hybrid_opt.run_files.durable import ASIDE, write_atomically
from hybrid_opt.run_files.run_folder import REPORTS, dump_yaml, remove_entries

CONTENTS = (
    *("study.yaml", "study.json", "results.csv", "results.parquet", "summary.csv", "lock", "runs", "fit", "search"),
    *REPORTS,
)


class StudyFolder:
    """Paths and writers of a study folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))
        self.study, self.index = self.path / "study.yaml", self.path / "study.json"
        self.results, self.summary = self.path / "results.csv", self.path / "summary.csv"
        self.runs, self.fit, self.search = (self.path / name for name in ("runs", "fit", "search"))

    def take(self, *, overwrite: bool = False) -> int | None:
        """Make the folder, empty if asked to, and lock it.

        Returns:
            The lock's file descriptor, which child processes should keep open; None where there are no such locks.

        Raises:
            UserError: it holds other things than a study, another process has it, or it cannot be written to.
        """
        present = {entry.name for entry in self.path.iterdir()} if os.path.isdir(self.path) else set()
        present = {name for name in present if not name.startswith(ASIDE)}  # what a process that was killed leaves
        if present and not (present & {"study.yaml", "lock"} and present <= set(CONTENTS)):
            foreign = ", ".join(sorted(present - set(CONTENTS) or present)[:3])
            raise UserError(f"output: {self.path} holds other things than a study ({foreign}); choose a new folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._lock()
        except OSError as error:
            raise UserError(f"output: {self.path} cannot be written to: {error.strerror}") from None
        if overwrite:
            remove_entries(self.path, (name for name in CONTENTS if name != "lock"))
        return lock

    def write_study(self, study: dict[str, Any]) -> None:
        """The resolved study."""
        write_atomically(self.study, dump_yaml(study))

    def write_index(self, index: dict[str, Any]) -> None:
        """How the runs stand."""
        write_atomically(self.index, json.dumps(index, indent=2) + "\n")

    def _lock(self) -> int | None:
        if not locking.EXIST:
            return None
        self._file = (self.path / "lock").open("w")  # held until the process ends, or this object is gone
        if not locking.lock(self._file):
            raise UserError(
                f"output: {self.path} is in use: another hybrid-opt ablate, or a run that it left behind, has not ended yet; wait "
                "for it, or choose another folder"
            )
        return self._file.fileno()
