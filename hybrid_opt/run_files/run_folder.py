"""The folder that a run leaves behind. Next: `summary.py`, `curves.py`.

    machine.json        on what it was made: machine and versions
    run.yaml            resolved configuration (only for runs from a run file)
    metrics.jsonl       one line a step
    evaluations.jsonl   one line an evaluation
    ledger.jsonl        what ES steps were made of, from which weights are made again
    checkpoints/        to resume from; with training.divergence the best weights, to go back to (best/)
    logs/               what the experiment trackers of `report_to` write, such as TensorBoard's event files
    summary.json        before, after, and what each estimator contributed
    curves.png          loss against steps and seconds
    model/              the final model, as transformers loads it
    messages.log        what the run said along the way, with the time
    process.json        which process writes the folder, or wrote it last
    replayed/, export/  what `hybrid-opt replay` and `hybrid-opt export` made
    report.*            what `hybrid-opt report` made of the others

One idea: a folder is only ever written to by a run that began with it empty, unless the user says otherwise.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from hybrid_opt.config.yaml_text import YAML_12_FLOAT, read_yaml
from hybrid_opt.errors import UserError
from hybrid_opt.recovery.checkpoint import checkpoints, step_of
from hybrid_opt.recovery.ledger import NAME
from hybrid_opt.run_files.durable import ASIDE, write_atomically, writing
from hybrid_opt.run_files.json_lines import JsonLines
from hybrid_opt.run_files.messages import NAME as MESSAGES
from hybrid_opt.run_files.presence import NAME as PROCESS

REPORTS = ("report.html", "report.md", "report.json", "report.png")
CONTENTS = (
    "run.yaml",
    "machine.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    NAME,
    "checkpoints",
    "logs",
    "summary.json",
    "curves.png",
    "model",
    MESSAGES,
    PROCESS,
    "adapter",
    "replayed",
    "export",
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

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))  # which leaves a ~name as it is, where there is nobody of that name
        self.config = self.path / "run.yaml"
        self.machine = self.path / "machine.json"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.ledger = self.path / NAME
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
        if resume and (self.finished() or self.saved_step() is None):  # a finished one may have left snapshots
            hint = " (its run has finished)" if self.finished() else ""
            raise UserError(f"output: {self.path} has no checkpoint to resume from{hint}; start anew with --overwrite")
        present = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        # Another rank may be looking at the same time, or have been killed.
        present = [name for name in present if not name.startswith((TRIAL, ASIDE))]
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
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            earlier = {*CONTENTS, *(half.name for half in self.path.glob(f"{ASIDE}*"))}
            remove_entries(self.path, earlier - {PROCESS})  # which is this one

    def write_config(self, config: dict[str, Any]) -> None:
        """The resolved configuration as `run.yaml`, which `train` takes like the original."""
        write_atomically(self.config, dump_yaml(config))

    def write_machine(self, machine: dict[str, Any]) -> None:
        """What `describe_machine` found, as JSON."""
        write_atomically(self.machine, json.dumps(machine, indent=2) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """The summary as JSON."""
        write_atomically(self.summary, json.dumps(summary, indent=2) + "\n")

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote; empty if nothing was."""
        return read_yaml(self.config) if self.config.exists() else {}

    def recorded(self) -> tuple[JsonLines, JsonLines]:
        """The lines of `metrics` and of `evaluations`, read one at a time."""
        return JsonLines(self.metrics), JsonLines(self.evaluations)

    def append(self, path: Path, row: dict[str, Any]) -> None:
        """One line at the end of `metrics` or `evaluations`."""
        JsonLines(path).append(row)

    def drop_after(self, step: int) -> None:
        """Forget what was recorded of steps from `step` on, because they are taken again, and half a checkpoint of them."""
        metrics, evaluations = self.recorded()
        metrics.keep(lambda row: _step_in(row, metrics) < step)
        evaluations.keep(lambda row: _step_in(row, evaluations) <= step)
        self._remove_half_checkpoints()

    @contextmanager
    def saving(self, writes: bool = True) -> Iterator[None]:
        """Inside, a checkpoint is written; if that fails, nothing is left of it, and the one before is.

        Args:
            writes: whether this process is the one that writes the folder.

        Raises:
            CannotWriteError: the operating system does not let it be written.
        """
        if writes:  # what a checkpoint counts on
            for lines in self.recorded():
                lines.sync()
        try:
            with writing(self.checkpoints):
                yield
        except BaseException:
            if writes:
                self._remove_half_checkpoints()
            raise

    def saved_step(self) -> int | None:
        """After how many steps the newest checkpoint was saved; None: there is none."""
        return next(map(step_of, checkpoints(self.checkpoints)), None)

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that came to its end; None if it has not, or there is no run."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return summary if summary.get("finished") else None

    def way_on(self) -> str:
        """What a message about something that could not be written says at its end."""
        step = self.saved_step()
        if step is None:
            return "; no checkpoint had been saved, so start anew with --overwrite"
        return f"; the checkpoint after step {step} is whole: go on from it with the same command and --resume"

    def _remove_half_checkpoints(self) -> None:
        for aside in self.checkpoints.glob(".*"):
            shutil.rmtree(aside, ignore_errors=True)


def _step_in(row: dict[str, Any], lines: JsonLines) -> int:
    if not isinstance(row.get("step"), int):
        raise UserError(f"{lines.path}: a line has no step: {json.dumps(row)[:60]}; mend or delete it")
    return row["step"]
