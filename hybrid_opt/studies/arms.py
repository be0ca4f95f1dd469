"""From a study file to its runs. Next: `jobs.py`, which trains one, and `ablate.py`, which trains them all.

One idea: everything is known before anything is run, so what is wrong with the last arm is found in the first second.
"""

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from hybrid_opt.config.foreign_code import code_of, refuse_code
from hybrid_opt.config.loading import Change, load_changed
from hybrid_opt.config.run import RunFile
from hybrid_opt.config.study import BaselineName, Changes, StudyBudget, StudyFile, is_field
from hybrid_opt.config.yaml_text import read_yaml
from hybrid_opt.errors import UserError, did_you_mean
from hybrid_opt.studies.baselines import baseline


@dataclass(frozen=True)
class Arm:
    """One way of training that the study compares."""

    name: str
    changes: tuple[Change, ...] = ()
    baseline: BaselineName | None = None
    """The built-in baseline that adds its changes to these."""


@dataclass(frozen=True)
class Cell:
    """An arm at a task under a budget: what runs once with each seed."""

    task: str
    budget: StudyBudget
    arm: Arm
    changes: tuple[Change, ...]
    """All changes of the base run, but for seed and output."""

    @property
    def place(self) -> Path:
        """Folder within the study's."""
        return Path(slug(self.task), slug(self.budget.label), slug(self.arm.name))

    @property
    def names(self) -> dict[str, str]:
        """What identifies it in tables."""
        return {"task": self.task, "budget": self.budget.label, "arm": self.arm.name}

    def changed(self, *changes: Change) -> "Cell":
        """The same cell with further changes."""
        return replace(self, changes=(*self.changes, *changes))


class StudyPlan:
    """The cells of a study and their runs.

    Args:
        study: the study.
        path: its file, for messages and for files beside it.

    Raises:
        UserError: a run that the study asks for is not valid, or two arms have one name.
    """

    def __init__(self, study: StudyFile, path: Path) -> None:
        self.study, self.path = study, path
        self.base = _find_base(study.base, path)
        self.read = functools.cache(read_yaml)  # a study goes on for hours, and a file may be edited meanwhile
        self.arms = arms_of(study)
        self.tasks = list(study.tasks) or [self.base.stem]
        self._refuse_namesakes([arm.name for arm in self.arms], "arms")
        self._refuse_namesakes(self.tasks, "tasks")
        if study.reference not in (None, *(arm.name for arm in self.arms)):
            names = [arm.name for arm in self.arms]
            raise UserError(
                f"{path}: reference: {study.reference!r} is no arm{did_you_mean(study.reference, names)}; arms: {', '.join(names)}"
            )
        self.cells = [
            self._cell(task, budget, arm) for task in self.tasks for budget in study.budgets for arm in self.arms
        ]
        self.runs = [self.run(cell, study.seeds[0], Path(study.output)) for cell in self.cells]
        for cell, run in zip(self.cells, self.runs, strict=True):
            if run.data.validation is None:
                raise UserError(
                    f"{path}: task {cell.task!r}, arm {cell.arm.name!r}: data.validation is missing, and arms are compared by "
                    "their loss or reward on held-out rows; write a file, a split, or a fraction such as 0.1"
                )

    def refuse_code(self, allowed: bool) -> None:
        """Raise UserError, naming arm and key, if a run names code and nobody has allowed it."""
        for cell, run in zip(self.cells, self.runs, strict=True):
            try:
                refuse_code(code_of(run), allowed)
            except UserError as error:
                raise UserError(f"{self.path}: task {cell.task!r}, arm {cell.arm.name!r}: {error}") from None

    def run(self, cell: Cell, seed: int, folder: Path, *changes: Change) -> RunFile:
        """The run of a cell with a seed, that writes to a folder; further changes come last."""
        last = [
            (["training", "seed"], seed),
            (["training", "checkpoint_every"], self.study.checkpoint_every),
            (["training", "save_model"], self.study.keep_models),
            (["output"], str(folder)),
        ]
        return self._load([*cell.changes, *last, *changes], f"arm {cell.arm.name!r}, task {cell.task!r}")

    def rungs(self, cell: Cell) -> Iterator[tuple[str, Cell]]:
        """The cell with each of the changes that save memory, and what they are; those that do not suit the arm are left out."""
        yield "", cell
        for changes in self.study.fit:
            changed = cell.changed(*parted(changes))
            try:
                self.run(changed, self.study.seeds[0], Path(self.study.output))
            except UserError:  # such as a policy for an estimator that the arm does not have
                continue
            yield compact(changes), changed

    def rates_times(self, cell: Cell, factor: float) -> list[Change]:
        """Changes that multiply all learning rates of a cell."""
        estimators = self.run(cell, self.study.seeds[0], Path(self.study.output)).schedule.estimators
        return [
            (["schedule", "estimators", name, "learning_rate"], estimator.learning_rate * factor)
            for name, estimator in estimators.items()
        ]

    def _cell(self, task: str, budget: StudyBudget, arm: Arm) -> Cell:
        common = (*parted(self.study.tasks.get(task, {})), *parted(self.study.changes), *_limits(budget))
        own = arm.changes
        if arm.baseline:
            own += parted(self._baseline(arm.baseline, task, common))
        return Cell(task, budget, arm, (*common, *own))

    def _baseline(self, name: BaselineName, task: str, common: Sequence[Change]) -> Changes:
        run = self._load([*common, (["output"], self.study.output)], f"task {task!r}")
        try:
            return baseline(name, run)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    def _load(self, changes: Sequence[Change], who: str) -> RunFile:
        said_in, beside = f"{self.path}: {who}", [self.path.parent]
        return load_changed(self.base, changes, said_in=said_in, beside=beside, read=self.read)[0]

    def _refuse_namesakes(self, names: Sequence[str], key: str) -> None:
        folders: dict[str, str] = {}
        for name in names:
            if slug(name) in folders:
                raise UserError(
                    f"{self.path}: {key}: {folders[slug(name)]!r} and {name!r} are alike as names of folders; give one of the {key} another label"
                )
            folders[slug(name)] = name


def arms_of(study: StudyFile) -> list[Arm]:
    """The study's arms: every combination of the axes' levels, the author's own, and the baselines; the base run if there is nothing."""
    axes = [_levels(key, levels) for key, levels in study.axes.items()]
    arms = [
        Arm(", ".join(label for label, _ in levels), tuple(change for _, changes in levels for change in changes))
        for levels in (itertools.product(*axes) if axes else ())
    ]
    arms += [Arm(name, parted(changes)) for name, changes in study.arms.items()]
    arms = arms or [Arm("base")]
    return arms + [Arm(name, baseline=name) for name in study.baselines]


def parted(changes: Changes) -> tuple[Change, ...]:
    """Changes by dotted key as the loader takes them."""
    return tuple((key.split("."), value) for key, value in changes.items())


def compact(value: Any) -> str:
    """A value on one line, as one would write it in YAML, without braces around the whole."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).strip().removesuffix("\n...")
    return text[1:-1] if text.startswith("{") else text


LONGEST_NAME = 150
"""Bytes of a folder's name; file systems take 255."""


def slug(name: str) -> str:
    """A name as a folder's: without slashes, and of a length that file systems take."""
    text = re.sub(r"[^\w.+=-]+", "-", name).strip("-.") or "arm"
    if len(text.encode()) <= LONGEST_NAME:
        return text
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{text.encode()[:LONGEST_NAME].decode(errors='ignore')}-{digest}"


def _levels(key: str, levels: list[Any] | dict[str, Any]) -> list[tuple[str, tuple[Change, ...]]]:
    """An axis' labels, and what each of them changes."""
    if not is_field(key):
        return [(str(label), parted(changes)) for label, changes in levels.items()]
    labelled = levels.items() if isinstance(levels, dict) else [(_label(key, value), value) for value in levels]
    return [(str(label), parted({key: value})) for label, value in labelled]


def _label(key: str, value: Any) -> str:
    if key == "schedule" and isinstance(value, str):
        return Path(value).stem
    return f"{key.split('.')[-1]} {compact(value)}"


def _limits(budget: StudyBudget) -> tuple[Change, ...]:
    if budget.steps is not None:
        return (["training", "steps"], budget.steps), (["training", "budget"], None)
    currency = budget.model_dump(exclude_none=True, exclude={"peak_memory"})
    return (["training", "steps"], None), (["training", "budget"], currency)


def _find_base(name: str, path: Path) -> Path:
    for candidate in (Path(name), path.parent / name):
        if os.path.isfile(candidate):
            return candidate
    raise UserError(f"{path}: base: {name}: no such file, from here or beside the study file")
