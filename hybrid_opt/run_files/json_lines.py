"""Files with a JSON object a line, which are read while they are written. Next: `metrics.py`, what the lines say.

One idea: they are read one line at a time, so a file may be larger than memory. Its last line may be half there, because a process was
killed or because it is being written, and is left out; damage anywhere else is an error that names file and line.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hybrid_opt.errors import UserError
from hybrid_opt.run_files.durable import append_line, sync, writing

Row = dict[str, Any]


class JsonLines:
    """The rows of a file, read anew by each loop; none if there is no file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut = False
        """Whether the latest loop left out a last line that is half there."""

    def __iter__(self) -> Iterator[Row]:
        """The rows, in order.

        Raises:
            UserError: the file cannot be read, or a line before the last is damaged.
        """
        self.cut, self._passed = False, 0
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None
        with file:
            for number, line in enumerate(file, 1):
                if (row := self._row(number, line, file)) is None:
                    return
                yield row
                self._passed += len(line)

    def _row(self, number: int, line: bytes, rest: Iterable[bytes]) -> Row | None:
        """What a line holds; None at the end of what can be read."""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also brackets without end
            if line.endswith(b"\n") and any(other.strip() for other in rest):
                why = getattr(error, "msg", error)
                raise UserError(f"{self.path}: line {number}: not JSON ({why}); mend or delete the line") from None
            self.cut = bool(line.strip())  # blank lines at the end say nothing
            return None
        if not isinstance(row, dict):
            raise UserError(f"{self.path}: line {number}: expected keys and values in braces; mend or delete the line")
        return row

    def append(self, row: Row) -> None:
        """Add a row; see `append_line`."""
        append_line(self.path, json.dumps(row))

    def keep(self, kept: Callable[[Row], bool]) -> None:
        """Cut the file off at the first row that is not to be kept, or is half there.

        That needs no room on the disk, is done at once, and who follows the file still has it.
        """
        if not self.path.exists():
            return
        for _ in itertools.takewhile(kept, self):
            pass
        with writing(self.path), self.path.open("r+b") as file:
            file.truncate(self._passed)
            file.seek(max(0, self._passed - 1))
            if file.read(1) not in (b"", b"\n"):  # a whole row but for its end
                file.write(b"\n")

    def sync(self) -> None:
        """Wait until what was appended would survive a power cut."""
        if self.path.exists():
            with writing(self.path):
                sync(self.path)
