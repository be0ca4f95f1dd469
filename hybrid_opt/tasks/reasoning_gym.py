"""Tasks of the reasoning-gym package (extra `tasks`), and its own scorers. Next: `refused.py`.

One idea: rows are made by a process of its own, so that they are the same on every machine, rank and resumption, whatever
that package does with the global random generator and with the order of Python's sets.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from hybrid_opt.config.tasks import ReasoningGym, SplitName
from hybrid_opt.errors import UserError, did_you_mean
from hybrid_opt.tasks.completions import last_answer, text_of
from hybrid_opt.tasks.reasoning_gym_rows import REFUSED
from hybrid_opt.tasks.refused import refused

COLUMNS = ("question", "answer", "entry")
MOST_CHARACTERS = 10_000
"""A longer answer scores 0: some of the package's scorers take time that grows faster than the answer."""


def reasoning_gym(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    question: Sequence[str],
    answer: Sequence[str | None],
    entry: Sequence[str],
    **columns: Any,
) -> list[float]:
    """The task's own score of each completion's answer, from 0 to 1 (TRL's reward function).

    The answer is what stands in the last `<answer>...</answer>`, or the whole completion where there is none, without white space
    at its ends. It scores 0 if it is longer than MOST_CHARACTERS, if the scorer fails on it, or if the score is not finite.

    Args:
        question, answer, entry: the columns of the task's rows.

    Raises:
        UserError: the package is missing, or the rows are of a task that is not offered (see `refused.py`).
    """
    rows = zip(completions, question, answer, entry, strict=True)
    return [_score(text_of(completion), asked, right, json.loads(more)) for completion, asked, right, more in rows]


def _score(text: str, question: str, answer: str | None, entry: dict[str, Any]) -> float:
    dataset = _dataset(entry["name"], json.dumps(entry["options"]))
    found = last_answer(text)
    given = (text if found is None else found).strip()
    if len(given) > MOST_CHARACTERS:
        return 0.0
    try:
        score = float(
            dataset.score_answer(
                given, {"question": question, "answer": answer, "metadata": deepcopy(entry["metadata"])}
            )
        )
    except Exception:  # whatever a scorer of the package raises about an answer of a form that it does not expect
        return 0.0
    return score if math.isfinite(score) else 0.0


def task_class(name: str, key: str = "data.train") -> type:
    """The class of a task in reasoning-gym.

    Args:
        key: where in the run file the task was written, for messages.

    Raises:
        UserError: the package is not installed, has no such task, or the task is not offered.
    """
    if find_spec("reasoning_gym") is None:
        raise UserError(
            f"{key}: task reasoning_gym needs the package reasoning-gym, not installed here: pip install 'hybrid-opt[tasks]', or "
            "pip install reasoning-gym"
        )
    from reasoning_gym.factory import DATASETS  # only here, as it takes a second

    if name not in DATASETS:
        raise UserError(f"{key}: reasoning-gym has no task {name!r}{did_you_mean(name, DATASETS)}")
    if reason := refused(name, DATASETS[name][0]):
        raise UserError(f"{key}: reasoning-gym's task {name!r} is not offered: {reason}; choose another")
    return DATASETS[name][0]


@lru_cache(maxsize=16)
def _dataset(name: str, options: str) -> Any:
    """The object whose `score_answer` judges; it makes no rows."""
    task_class(name, "objective.rewards: reasoning_gym")
    from reasoning_gym.factory import create_dataset

    return create_dataset(name, seed=0, size=1, **json.loads(options))


def rows(task: ReasoningGym, split: SplitName, key: str) -> list[dict[str, Any]]:
    """Rows of a task, made by `reasoning_gym_rows.py` in another process.

    Raises:
        UserError: as for `task_class`; or options that the task does not take; or there are too few different questions.
    """
    task_class(task.name, key)
    order = {"name": task.name, "options": task.options, "rows": task.rows, "seed": task.seed, "split": split}
    done = subprocess.run(
        [sys.executable, "-m", "hybrid_opt.tasks.reasoning_gym_rows"],
        input=json.dumps(order),
        env={
            **os.environ,
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1]
        raise UserError(f"{key}.{said}" if done.returncode == REFUSED else f"{key}.name: {task.name} failed: {said}")
    return json.loads(done.stdout)
