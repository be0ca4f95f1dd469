"""The exception for mistakes that a user can mend; the command line shows its message alone and exits with 2. Next:
`cli/__init__.py`, which does so."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Says what is wrong, where (file, key, parameter name), and what to write instead."""


class DivergedError(UserError):
    """A loss or a weight is no longer finite, or a loss rises; every process of a run finds that at the same step."""


class DriftError(UserError):
    """Weights have changed outside an update; every process of a run finds that at the same step."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the nearest known word, or nothing if none is near."""
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


LONGEST_LINE = 1000
"""Characters of a line of a message; what is quoted from a file may have millions."""


def error_line(message: object, rank: int) -> str:
    """How a process reports an error; only rank 0, and a process alone, need not say who they are.

    What a file says is shown as text, whatever a terminal would make of it.
    """
    lines = [_printable(line) for line in str(message).split("\n")]
    lines = [line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 3]}..." for line in lines]
    return f"{f'error (rank {rank})' if rank else 'error'}: " + "\n".join(lines)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
