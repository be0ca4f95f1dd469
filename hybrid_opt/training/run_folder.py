"""The folder that a run leaves behind. Next: `summary.py`, `curves.py`.

    machine.json        on what it was made: machine and versions
    run.yaml            resolved configuration (only for runs from a run file)
    metrics.jsonl       one line a step
    evaluations.jsonl   one line an evaluation
    checkpoints/        to resume from
    logs/               what the experiment trackers of `report_to` write, such as TensorBoard's event files
    summary.json        before, after, and what each estimator contributed
    curves.png          loss against steps and seconds
    model/              the final model, as transformers loads it
    report.*            what `hybrid-opt report` made of the others

One idea: a folder is only ever written to by a run that began with it empty, unless the user says otherwise.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from hybrid_opt.config.yaml_text import YAML_12_FLOAT, read_yaml
from hybrid_opt.errors import UserError
from hybrid_opt.reports.files import read_lines

REPORTS = ("report.html", "report.md", "report.json", "report.png")
CONTENTS = (
    "run.yaml",
    "machine.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "checkpoints",
    "logs",
    "summary.json",
    "curves.png",
    "model",
    "adapter",
    *REPORTS,
)

TRIAL = ".hybrid-opt-"
"""What the entry begins with that shows whether the folder can be written to."""


class _Dumper(yaml.SafeDumper):
    """Quotes texts such as 12e45, which the loader of run files would otherwise read as numbers."""


_Dumper.add_implicit_resolver(*YAML_12_FLOAT)


def dump_yaml(document: dict[str, Any]) -> str:
    """A configuration as YAML that our loader reads back as it is."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def remove_entries(folder: Path, names: Iterable[str]) -> None:
    """Remove these files and folders, as far as they are there."""
    for name in names:
        entry = folder / name
        if entry.is_dir() and not entry.is_symlink():  # what a link leads to is not ours
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


class RunFolder:
    """Paths and writers of a run folder."""

    def __init__(self, path: str | Path):
        self.path = Path(os.path.expanduser(path))  # which leaves a ~name as it is, where there is nobody of that name
        self.config = self.path / "run.yaml"
        self.machine = self.path / "machine.json"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.summary = self.path / "summary.json"
        self.curves = self.path / "curves.png"
        self.model = self.path / "model"

    def check(self, *, overwrite: bool = False, resume: bool = False) -> None:
        """Whether a run may use the folder; leaves everything as it is.

        Raises:
            UserError: it holds a run already (and neither option is given), holds other things, cannot be written to, or
                there is nothing in it to resume.
        """
        try:
            for place in (self.path, *(Path(os.sep, part) for part in self.path.parts)):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    place.lstat()
        except (OSError, ValueError) as error:  # a name that no folder can have
            problem = getattr(error, "strerror", None) or error
            raise UserError(f"output: {str(self.path)[:80]!r} cannot be written to: {problem}") from None
        if resume and not any(self.checkpoints.glob("step-*")):
            hint = " (its run has finished)" if self.summary.exists() else ""
            raise UserError(f"output: {self.path} has no checkpoint to resume from{hint}; start anew with --overwrite")
        present = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        # Another rank may be looking at the same time.
        present = [name for name in present if not name.startswith(TRIAL)]
        foreign = sorted(set(present) - set(CONTENTS))
        if foreign and not resume:
            raise UserError(
                f"output: {self.path} holds other things than a run ({', '.join(foreign[:3])}); choose a new folder"
            )
        if present and not (overwrite or resume):
            raise UserError(
                f"output: {self.path} holds a run already; go on with it by --resume, replace it by --overwrite, or choose "
                "another folder with output=..."
            )
        existing = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        try:
            with tempfile.TemporaryDirectory(dir=existing, prefix=TRIAL):
                pass
        except OSError as error:
            raise UserError(f"output: {self.path} cannot be written to: {error.strerror}") from None

    def prepare(self) -> None:
        """Make the folder, without anything that an earlier run left in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_entries(self.path, CONTENTS)

    def write_config(self, config: dict[str, Any]) -> None:
        """The resolved configuration as `run.yaml`, which `train` takes like the original."""
        self.config.write_text(dump_yaml(config), encoding="utf-8")

    def write_machine(self, machine: dict[str, Any]) -> None:
        """What `describe_machine` found, as JSON."""
        self.machine.write_text(json.dumps(machine, indent=2) + "\n", encoding="utf-8")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """The summary as JSON."""
        self.summary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def clear_checkpoints(self) -> None:
        """A finished run needs none."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote; empty if nothing was."""
        return read_yaml(self.config) if self.config.exists() else {}

    def append(self, path: Path, row: dict[str, Any]) -> None:
        """One JSON line at the end of a file."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, path: Path) -> list[dict[str, Any]]:
        """The lines of a file that `append` wrote, but for a last one that is half written; none if there is no file.

        Raises:
            UserError: another line is damaged.
        """
        rows, _ = read_lines(path)
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get("step"), int):
                raise UserError(f"{path}: line {number}: no step; mend or delete the line")
        return rows

    def drop_after(self, step: int) -> None:
        """Forget what was recorded of steps from `step` on, because they are taken again."""
        for path, kept in (
            (self.metrics, lambda row: row["step"] < step),
            (self.evaluations, lambda r: r["step"] <= step),
        ):
            if path.exists():
                path.write_text(
                    "".join(json.dumps(row) + "\n" for row in self.rows(path) if kept(row)), encoding="utf-8"
                )
