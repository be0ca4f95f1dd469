"""Which of a few labels a completion chooses, on any dataset. Next: `conciseness.py`.

One idea: a label counts only where it is marked as one, and marks that disagree choose nothing.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any

from pydantic import AfterValidator

from hybrid_opt.errors import UserError
from hybrid_opt.tasks.completions import references, text_of

MOST_CHARACTERS = 50_000


def _different(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(labels)) < max(2, len(labels)) or not all(label.strip() == label != "" for label in labels):
        raise ValueError("choices needs at least two different labels, without white space at their ends")
    return labels


Labels = Annotated[tuple[str, ...], AfterValidator(_different)]


def multiple_choice(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    column: str = "answer",
    choices: Labels = ("A", "B", "C", "D"),
    **columns: Any,
) -> list[float | None]:
    """1 where a completion chooses the right label, else 0 (TRL's reward function); see `chosen` for what counts.

    Args:
        column: where the right labels are: a label, or a number that counts the choices from 0; null gives None, no reward.
        choices: the labels, as completions write them.

    Raises:
        UserError: a value of the column is none of the choices.
    """
    rights = [None if right is None else _label(right, choices, column) for right in references(columns, column)]
    return [
        None if right is None else float(chosen(text_of(completion), choices) == right)
        for completion, right in zip(completions, rights, strict=True)
    ]


def _label(right: Any, choices: tuple[str, ...], column: str) -> str:
    if isinstance(right, int) and not isinstance(right, bool) and 0 <= right < len(choices):
        return choices[right]
    if str(right).strip() in choices:
        return str(right).strip()
    raise UserError(
        f"multiple_choice: the column {column!r} holds {right!r}, which is none of the choices {', '.join(choices)}; write "
        "arguments: {choices: [...]} with all labels"
    )


def chosen(text: str, choices: tuple[str, ...]) -> str | None:
    """The label that a completion chooses; None: none, or several.

    1. Statements decide, if there are any: `answer`, perhaps `is`, or `choice` or `option` with `is`, `:` or `=`; then one to eight
       of white space and `: = ( [ * " '`; then a label: `Answer: A`, `the answer is (B) because ...`. Labels that follow after `or`,
       `and`, `,` or `/` are stated too.
    2. Otherwise marks do: a label that is the whole completion, that begins a line and is followed by `.`, `:` or the line's end,
       or that a closing bracket follows anywhere: `A`, `A.`, `A) text`, `(A)`. `**` around it does not matter.

    Labels are compared as written, case included, and never within a word. Where step 1 or 2 finds two different labels, nothing
    is chosen. Only the last MOST_CHARACTERS characters are read.
    """
    text = text[-MOST_CHARACTERS:]
    statement, mark = _patterns(choices)
    one = f"(?<!\\w)(?:{_any(choices)})(?!\\w)"
    stated = [label for found in statement.finditer(text) for label in re.findall(one, found[1])]
    found = set(stated) or {match[1] or match[2] for match in mark.finditer(text)}
    return found.pop() if len(found) == 1 else None


def _any(choices: tuple[str, ...]) -> str:
    return "|".join(re.escape(label) for label in sorted(choices, key=len, reverse=True))


@lru_cache
def _patterns(choices: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Every repetition but that of listed labels is bounded, so searching takes linear time."""
    label, leading = f"(?:{_any(choices)})(?!\\w)", r"[(\[*\"']{0,4}"
    lead = r"(?i:\b(?:answer(?: is)?|(?:choice|option)(?: is|(?= ?[:=]))))[\s:=(\[*\"']{1,8}"
    several = rf"(?:[)\]*\"']{{0,4}}(?:, ?| ?/ ?| or | and ){leading}{label})*"
    mark = rf"^ {{0,8}}\*{{0,2}}({label})\*{{0,2}}(?:(?=[.:])| {{0,8}}$)|(?<!\w)({label})\*{{0,2}}[)\]]"
    return re.compile(rf"{lead}({label}{several})"), re.compile(mark, re.MULTILINE)
