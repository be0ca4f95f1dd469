"""Whether a completion is the reference, on any dataset. Next: `multiple_choice.py`.

One idea: what counts as equal is one of three named forms, and none of them takes one script's digits for another's.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from hybrid_opt.tasks.completions import references, text_of

Normalize = Literal["none", "strip", "text"]


def _with_a_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    if not groups:
        raise ValueError(f"{pattern!r} has no group; put the part that is the answer in parentheses")
    return pattern


Pattern = Annotated[str, AfterValidator(_with_a_group)]


def exact_match(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    column: str = "answer",
    pattern: Pattern | None = None,
    normalize: Normalize = "strip",
    **columns: Any,
) -> list[float | None]:
    """1 where a completion equals its reference, else 0 (TRL's reward function).

    Args:
        column: where the references are: a text or a number; a list, of which any will do; null gives None, no reward.
        pattern: a regular expression; the first group of its first match is compared in place of the completion, and a completion
            without a match gets 0. An expression that takes exponential time ends with the reward's timeout at best: write
            none that nests repetitions, such as `(a+)+`.
        normalize: what is done to both before they are compared. `none`: nothing. `strip`: white space at the ends goes. `text`:
            also case (by Unicode's case folding), runs of white space (one space each), a final `.`, `!` or `?`, and the way
            accents are encoded (NFC). Digits of another script stay different in all of them.
    """
    return [
        None if reference is None else float(_equal(text_of(completion), reference, pattern, normalize))
        for completion, reference in zip(completions, references(columns, column), strict=True)
    ]


def _equal(text: str, reference: Any, pattern: str | None, normalize: Normalize) -> bool:
    if pattern is not None:
        match = re.search(pattern, text)
        if match is None or match[1] is None:
            return False
        text = match[1]
    references = reference if isinstance(reference, (list, tuple)) else [reference]
    return normalized(text, normalize) in [normalized(str(one), normalize) for one in references]


def normalized(text: str, form: Normalize) -> str:
    """The text in one of the forms of `exact_match`."""
    if form == "none":
        return text
    if form == "strip":
        return text.strip()
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return text[:-1].rstrip() if text.endswith((".", "!", "?")) else text
