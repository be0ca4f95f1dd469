"""Which questions a task's rows have: different ones, in random order, of one split. Next: `rows.py`.

One idea: all possible questions are numbered, and rows are drawn by number. A hash of the question itself, not of the draw, says
which split it belongs to, so two draws of different splits can never share a question.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

from hybrid_opt.config.tasks import SplitName
from hybrid_opt.errors import UserError

HELD_OUT_ONE_IN = 5
LISTED = 2**20
"""Up to so many questions are shuffled as a whole; of more, numbers are drawn and repeated ones dropped."""
PATIENCE = 20_000
"""Draws in a row without a new question after which there are taken to be no more."""


def drawn(size: int, seed: int) -> Iterator[int]:
    """The numbers 0 to size - 1 in an order that the seed decides, each once, as far as they are asked for."""
    generator = random.Random(seed)
    if size <= LISTED:
        yield from generator.sample(range(size), size)
        return
    seen: set[int] = set()
    while len(seen) < size:
        number = generator.randrange(size)
        if number not in seen:
            seen.add(number)
            yield number


def belongs(question: str, split: SplitName) -> bool:
    """Whether a question is in a split: held out are those whose SHA-256 hash is divisible by HELD_OUT_ONE_IN."""
    digest = int.from_bytes(hashlib.sha256(question.encode()).digest(), "big")
    return split == "all" or (digest % HELD_OUT_ONE_IN == 0) == (split == "held_out")


def different(
    candidates: Iterable[tuple[str, dict[str, Any]] | None], count: int, split: SplitName, patience: int = PATIENCE
) -> list[dict[str, Any]]:
    """The first rows of a split with different questions.

    Args:
        candidates: what identifies a question, and its row; None: a number that stands for no question.
        count: rows to find.

    Raises:
        UserError: there are fewer.
    """
    rows: dict[str, dict[str, Any]] = {}
    misses = 0
    for candidate in candidates:
        if candidate is not None and candidate[0] not in rows and belongs(candidate[0], split):
            rows[candidate[0]], misses = candidate[1], -1
        misses += 1
        if len(rows) == count or misses == patience:
            break
    if len(rows) < count:
        whole = "" if split == "all" else f" in the split {split!r}"
        raise UserError(
            f"rows: {count} rows with different questions were asked for, but these options gave only {len(rows)}{whole}; write "
            f"rows: {len(rows)}, or options with more questions" + (", or split: all" if whole else "")
        )
    return list(rows.values())
