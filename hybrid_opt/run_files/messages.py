"""What a run says along the way, kept beside what it measures. Next: `run_folder.py`.

One idea: whoever looks at a run later sees what its terminal has shown: warnings, roll backs, why it stopped.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hybrid_opt.run_files.durable import CannotWriteError, append_line

NAME = "messages.log"
MOST = 1000
"""Lines that a process keeps; a library that warns in every step is not to fill the disk."""


class Messages:
    """Shows lines and keeps them.

    Args:
        folder: where they are kept, as long as it is there; None: nowhere.
        show: shows a line.
    """

    def __init__(self, folder: Path | None, show: Callable[[str], None]) -> None:
        self.folder, self.show, self.kept = folder, show, 0

    def say(self, text: str) -> None:
        """Show a line, and keep it."""
        self.show(text)
        self.keep(text)

    def keep(self, text: str) -> None:
        """Only keep it; on a disk that is full it is lost, for what the run measures matters more."""
        if self.folder is None or self.kept >= MOST or not self.folder.is_dir():
            return
        self.kept += 1
        line = " ".join(text.split()) if self.kept < MOST else "(no more lines of this process are kept)"
        try:
            append_line(self.folder / NAME, f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ} {line}")
        except CannotWriteError:
            self.kept = MOST

    @contextmanager
    def warnings_kept(self) -> Iterator[None]:
        """Inside, Python's warnings are kept too; they are shown as always."""
        before = warnings.showwarning

        def show(message: Any, *where: Any, **more: Any) -> None:
            before(message, *where, **more)
            self.keep(f"warning: {message}")

        warnings.showwarning = show
        try:
            yield
        finally:
            warnings.showwarning = before
