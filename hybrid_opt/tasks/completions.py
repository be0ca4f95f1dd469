"""What scorers read of a completion: its text, and the answer it marks in it. Next: `scorers.py`.

One idea: a model may write anything, so every search takes time linear in the length (no lazy regular expressions).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_opt.errors import UserError, did_you_mean

OPEN, CLOSE = "<answer>", "</answer>"


def text_of(completion: Any) -> str:
    """The text of a completion.

    Args:
        completion: a text; or, in TRL's conversational form, a list of messages `{"role": ..., "content": ...}`, whose contents
            are joined. A content may be a text or a list of parts, of which those with a text count. None is no text.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, dict):
        return text_of(completion.get("content", completion.get("text")))
    if isinstance(completion, (list, tuple)):
        return "".join(text_of(part) for part in completion)
    return ""


def last_answer(text: str) -> str | None:
    """What stands in the last `<answer>...</answer>`; None: there is none.

    Tags are paired from the left: an opening tag goes with the next closing one, and an opening tag between them is text.
    """
    found, place = None, 0
    while (start := text.find(OPEN, place)) >= 0 and (end := text.find(CLOSE, start)) >= 0:
        found, place = text[start + len(OPEN) : end], end + len(CLOSE)
    return found


def references(columns: Mapping[str, Sequence[Any]], column: str) -> Sequence[Any]:
    """The column that completions are compared with.

    Raises:
        UserError: it is not there.
    """
    if column not in columns:
        raise UserError(
            f"objective.rewards: there is no column {column!r}{did_you_mean(column, columns)} to compare with; write arguments: "
            f"{{column: ...}} with one of {', '.join(columns) or '(none)'}"
        )
    return columns[column]
