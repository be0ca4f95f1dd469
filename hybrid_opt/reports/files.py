"""Texts, YAML, JSON, JSON lines and CSV as a report needs them: absent is allowed, damaged is not. Next: `reading.py`.

One idea: a file that is damaged is named, with the line, rather than reported on in part.
"""

import csv
import json
from pathlib import Path
from typing import Any

from hybrid_opt.config.yaml_text import parse_yaml
from hybrid_opt.errors import UserError
from hybrid_opt.run_files.json_lines import JsonLines


def read_text(path: Path) -> str | None:
    """The file's text; None if there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The JSON object or YAML mapping in a file, by the file's ending; empty if there is no such file."""
    text = read_text(path)
    if text is None:
        return {}
    try:
        document = json.loads(text) if path.suffix == ".json" else parse_yaml(text, str(path))
    except UserError as error:
        raise UserError(f"{error}; {_MEND}") from None
    except (ValueError, RecursionError) as error:
        line = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}: {line}not JSON ({getattr(error, 'msg', error)}); {_MEND}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected keys and values; {_MEND}")
    return document


def read_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The objects of a JSON lines file, and whether its last line was left out because it is half written.

    Raises:
        UserError: a line before the last is damaged.
    """
    lines = JsonLines(path)
    return list(lines), lines.cut


def read_csv(path: Path, *, texts: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a CSV file with numbers, True, False and None in place of their texts; none if there is no such file.

    Args:
        texts: columns that must be there and stay texts.
    """
    text = read_text(path)
    if text is None:
        return []
    reader = csv.DictReader(text.splitlines())
    missing = [column for column in texts if column not in (reader.fieldnames or ())]
    if missing:
        raise UserError(f"{path}: line 1: no column {missing[0]!r}; run the study again to write the file anew")
    return [
        {name: value if name in texts else _value(value) for name, value in row.items() if name is not None}
        for row in reader
    ]


def _value(text: str | None) -> Any:
    word = (text or "").strip().lower()
    if word in ("", "true", "false", "nan", "none"):
        return {"true": True, "false": False}.get(word)
    try:
        return float(word)
    except ValueError:
        return text


_MEND = "mend the file, or delete it and report on the rest"
