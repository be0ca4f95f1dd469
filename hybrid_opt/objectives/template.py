"""Prompt templates over a dataset's columns: `"Review: {review}\\nSentiment:"`. Next: `examples.py`."""

import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hybrid_opt.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Template:
    """A text with `{column}` in it; `{{` and `}}` stand for braces."""

    key: str
    """Where it was written, such as `data.prompt`, for messages."""
    pieces: tuple[tuple[str, str | None], ...]
    """Literal text and the column after it."""

    @classmethod
    def parse(cls, text: str, key: str) -> "Template":
        """Read a template.

        Raises:
            UserError: braces that do not match, or anything but a column's name between them.
        """
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"{key}: {error} in {text!r}; write {{{{ and }}}} for braces themselves") from None
        for _, column, form, conversion in parts:
            if column is not None and (form or conversion or not column.strip()):
                raise UserError(
                    f"{key}: only column names may stand between braces, in {text!r}; write {{{{ for a brace"
                )
        return cls(key, tuple((literal, column) for literal, column, _, _ in parts))

    @property
    def columns(self) -> list[str]:
        """The columns that it names, each once."""
        return list(dict.fromkeys(column for _, column in self.pieces if column is not None))

    def check(self, columns: Collection[str]) -> None:
        """Raise UserError if it names a column that is not there."""
        for column in self.columns:
            if column not in columns:
                raise UserError(
                    f"{self.key}: there is no column {column!r}{did_you_mean(column, columns)}; "
                    f"columns: {', '.join(columns)}"
                )

    def values(self, row: Mapping[str, Any], number: int) -> dict[str, str]:
        """The row's texts for the columns it names.

        Raises:
            UserError: a value is missing (null).
        """
        for column in self.columns:
            if row[column] is None:
                raise UserError(f"{self.key}: row {number} has no value in column {column!r}; fill it or drop the row")
        return {column: str(row[column]) for column in self.columns}

    def render(self, values: Mapping[str, str]) -> str:
        """The text with values in place of columns."""
        return "".join(literal + (values[column] if column is not None else "") for literal, column in self.pieces)
