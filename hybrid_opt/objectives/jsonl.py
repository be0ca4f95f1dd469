"""A quick look into a JSON Lines file: its columns, or the line that is broken. Next: `data.py`."""

import json
from pathlib import Path

from hybrid_opt.errors import UserError


def columns(path: Path) -> list[str]:
    """Column names, read from the whole file.

    Raises:
        UserError: a line is not a JSON object (the message gives its number), or there is no line at all.
    """
    found: dict[str, None] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    found.update(dict.fromkeys(_object(line, f"{path}, line {number}")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not found:
        raise UserError(f"{path}: the file holds no rows")
    return list(found)


def _object(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, or brackets without end
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f'{where}: expected an object such as {{"text": "..."}}, found {line.strip()[:40]!r}')
    return row
