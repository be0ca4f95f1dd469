"""Whether data and rewards fit together, found out without torch and without loading what is large. Next: `contract.py`."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from hybrid_opt.config.data import Data
from hybrid_opt.config.objectives import Objective
from hybrid_opt.config.rewards import FUNCTION, Reward, RewardFunction
from hybrid_opt.config.run import RunFile
from hybrid_opt.config.tasks import Task
from hybrid_opt.errors import UserError, did_you_mean
from hybrid_opt.objectives import jsonl
from hybrid_opt.objectives.template import Template
from hybrid_opt.tasks.rows import columns_of
from hybrid_opt.tasks.scorers import needed_columns


def check_data(run: RunFile) -> None:
    """Whether local data files exist, can be read, and have the columns that templates and reward functions name; and built-in
    tasks likewise.

    Other sources, and reward functions of the user's own, are looked at only when training starts.

    Raises:
        UserError: naming the file, the line, the column or the reward function.
    """
    _check(run.data, run.objective)
    for name, own in run.objectives.items():
        try:
            _check(own.data or run.data, own.objective)
        except UserError as error:
            raise UserError(f"objectives.{name}.{error}") from None


def _check(data: Data, objective: Objective) -> None:
    templates = [
        Template.parse(text, f"data.{key}")
        for key, text in (("prompt", data.prompt), ("completion", data.completion))
        if text is not None
    ]
    for key, column in (("messages", data.messages), ("text", data.text)):
        if column is not None:
            templates.append(Template(f"data.{key}", (("", column),)))
    sources = [("data.train", data.train)]
    if isinstance(data.validation, Task) or (isinstance(data.validation, str) and Path(data.validation).suffix):
        sources.append(("data.validation", data.validation))
    for key, source in sources:
        columns = columns_of(source, key) if isinstance(source, Task) else _columns(Path(source), key)
        if columns is None:
            continue
        for template in templates:
            template.check(columns)
        for number, judge in enumerate(objective.rewards if isinstance(objective, Reward) else ()):
            _check_scorer(judge, columns, f"objective.rewards.{number}")


def _columns(path: Path, key: str) -> list[str] | None:
    if path.suffix not in (".jsonl", ".csv", ".txt"):
        return None
    if not os.path.isfile(path):
        raise UserError(f"{key}: {path}: no such file")
    if path.suffix == ".txt":
        return ["text"]
    try:
        if path.suffix == ".jsonl":
            return jsonl.columns(path)
        with path.open(encoding="utf-8", newline="") as file:
            return next(csv.reader(file), [])
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{key}: {path}: cannot be read: {error}") from None


def _check_scorer(judge: RewardFunction, columns: Sequence[str], key: str) -> None:
    if FUNCTION.fullmatch(judge.function):
        return
    for column in needed_columns(judge.function, judge.arguments, key):
        if column not in columns:
            raise UserError(
                f"{key}: {judge.function} needs the column {column!r}{did_you_mean(column, columns)}; columns: {', '.join(columns)}"
            )
