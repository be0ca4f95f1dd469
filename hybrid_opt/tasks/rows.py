"""The rows and the columns of a built-in task. Next: `reasoning_gym.py`.

One idea: columns are known before any row is made, so a run file can be checked at once.
"""

from typing import Any

from hybrid_opt.config.tasks import Arithmetic, BuiltInTask, Conciseness, Countdown, ReasoningGym, SplitName
from hybrid_opt.errors import UserError
from hybrid_opt.tasks import arithmetic, conciseness, countdown, reasoning_gym
from hybrid_opt.tasks.sampling import belongs, different

SPLITS: dict[str, SplitName] = {"data.train": "train", "data.validation": "held_out"}
"""Where a task stands in the run file -> the split that it draws from, if it does not say."""


def columns_of(task: BuiltInTask, key: str) -> tuple[str, ...]:
    """Names of the columns; makes no rows.

    Args:
        key: where in the run file the task stands.

    Raises:
        UserError: a task of reasoning-gym that is not there, or not offered.
    """
    match task:
        case Countdown():
            return countdown.COLUMNS
        case Arithmetic():
            return arithmetic.COLUMNS
        case Conciseness():
            return conciseness.COLUMNS
        case ReasoningGym():
            reasoning_gym.task_class(task.name, key)
            return reasoning_gym.COLUMNS


def rows_of(task: BuiltInTask, key: str) -> list[dict[str, Any]]:
    """Rows with different questions, a function of the task's options alone.

    Args:
        key: `data.train` or `data.validation`; decides the split of a task that names none.

    Raises:
        UserError: there are fewer different questions than rows; and as for `columns_of`.
    """
    split = task.split or SPLITS[key]
    try:
        match task:
            case Countdown():
                return different(countdown.candidates(task), task.rows, split)
            case Arithmetic():
                return different(arithmetic.candidates(task), task.rows, split)
            case Conciseness():
                found = list(conciseness.candidates(task))
                return different(found, task.rows or sum(belongs(question, split) for question, _ in found), split)
            case ReasoningGym():
                return reasoning_gym.rows(task, split, key)
    except UserError as error:
        where = "" if str(error).startswith(key) else f"{key}."
        raise UserError(f"{where}{error}") from None
