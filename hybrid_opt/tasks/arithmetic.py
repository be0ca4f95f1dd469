"""Chains of sums, differences and products, and a scorer that reads the result. Next: `expressions.py`.

One idea: numbers that a model wrote are compared as texts in a canonical form; a million digits are never converted.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from hybrid_opt.config.tasks import Arithmetic
from hybrid_opt.errors import UserError
from hybrid_opt.tasks.completions import text_of
from hybrid_opt.tasks.expressions import evaluate
from hybrid_opt.tasks.sampling import drawn

COLUMNS = ("question", "answer")
MOST_CHARACTERS = 100_000
_NUMBER = re.compile(r"(?:(?<![\w.)])[-\u2212])?(?<![\w.,])[0-9]+(?:\.[0-9]+)?(?!\w|[.,][0-9])")


def candidates(task: Arithmetic) -> Iterator[tuple[str, dict[str, Any]]]:
    """Questions with their rows, such as `{"question": "3 + 5", "answer": "8"}`, each once, in random order."""
    numbers, signs = task.largest - task.smallest + 1, len(task.operators)
    for number in drawn(numbers**task.terms * signs ** (task.terms - 1), task.seed):
        chain = []
        for place in range(task.terms):
            if place:
                number, sign = divmod(number, signs)
                chain.append(task.operators[sign])
            number, value = divmod(number, numbers)
            chain.append(str(task.smallest + value))
        question = " ".join(chain)
        yield question, {"question": question, "answer": str(evaluate(question)[0])}


def arithmetic(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    form: Literal["last_number", "number"] = "last_number",
    **columns: Any,
) -> list[float | None]:
    """1 where a completion gives the number in the column `answer`, else 0 (TRL's reward function; no answer: None).

    Numbers are ASCII digits, perhaps with a decimal part and with `-` or U+2212 before them; `08`, `8.0` and `8` are equal. A
    minus right after a digit, a letter or a parenthesis is a subtraction, so the last number of `7-5` is 5. Digits that touch a
    letter or a digit of another script, or that are grouped (`1,000`, `1.2.3`), are no number.

    Args:
        form: `last_number`: the last number in the completion's last MOST_CHARACTERS characters counts; `number`: the completion must be a number and nothing else,
            but for white space at its ends.

    Raises:
        UserError: the column holds something else than numbers.
    """
    return [
        None if right is None else float(_value(text_of(completion), form) == _reference(right))
        for completion, right in zip(completions, answer, strict=True)
    ]


def _reference(right: Any) -> str:
    number = _canonical(str(right).strip())
    if number is None:
        raise UserError(f"arithmetic: the column 'answer' holds {right!r}, which is no number; judge with exact_match")
    return number


def _value(text: str, form: str) -> str | None:
    if form == "number":
        return _canonical(text.strip())
    found = _NUMBER.findall(text, max(0, len(text) - MOST_CHARACTERS))  # from there on, but what stands before is seen
    return _canonical(found[-1]) if found else None


def _canonical(text: str) -> str | None:
    """Without needless zeros; None: no number. Never converted, as Python refuses to for more than 4300 digits."""
    if not re.fullmatch(r"[-\u2212]?[0-9]+(?:\.[0-9]+)?", text):
        return None
    whole, _, part = text.lstrip("-\u2212").partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    magnitude = f"{whole}.{part}" if part else whole
    return magnitude if text[0].isdigit() or magnitude == "0" else f"-{magnitude}"
