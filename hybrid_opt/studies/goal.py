"""By which measure the arms of a study are compared. Next: `study_table.py`.

One idea: a reward is compared as a reward; the loss, its negative, stands in for it only in arithmetic.
"""

from collections.abc import Iterable, Mapping
from typing import Any

BETTER = {"loss": "lower", "reward": "higher"}
"""Which side is better."""


def compared_by(summaries: Iterable[Mapping[str, Any]]) -> str:
    """The column in which the arms of a task and budget are compared: `reward` where all that have a loss have a reward."""
    evaluated = [row for row in summaries if row.get("loss") is not None]
    return "reward" if evaluated and all(row.get("reward") is not None for row in evaluated) else "loss"
