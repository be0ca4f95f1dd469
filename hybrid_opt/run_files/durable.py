"""Writing files so that neither a reader nor a full disk finds half of one. Next: `json_lines.py`, `run_folder.py`.

One idea: a file appears whole under its name or not at all, a line is written by one call or taken back, and whatever the operating
system refuses becomes one error that says what, why, and what to do.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from hybrid_opt.errors import UserError

ASIDE = ".writing-"
"""What the name of a file or folder begins with while it is being written; only a process that was killed leaves such a thing."""

MEND = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space, or ask for a larger quota",
    errno.EROFS: "make that file system writable",
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}
OF_TORCH = ("PytorchStreamWriter", "inline_container")
"""Parts of what `torch.save` says, in a RuntimeError without a number, when it cannot write."""


class CannotWriteError(UserError):
    """The operating system does not let a file be written.

    Args:
        path: the file or folder.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a file or folder is written, by whatever library.

    Raises:
        CannotWriteError: the operating system refused.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if (refused := _refusal(error)) is None:
            raise
        raise CannotWriteError(f"{path}: cannot be written: {refused}", path) from error


def _refusal(error: Exception) -> str | None:
    """Why, and what to do; None: it is another kind of mistake."""
    number, text = getattr(error, "errno", None), str(error)
    if isinstance(error, SafetensorError) and (found := re.search(r"\(os error (\d+)\)", text)):
        number = int(found[1])
    if number is not None:
        return f"{os.strerror(number)}; {MEND.get(number, 'mend that')}"
    if isinstance(error, OSError) or any(part in text for part in OF_TORCH):
        return f"{text.splitlines()[0] if text else type(error).__name__}; look whether the disk is full, or a quota used up"
    return None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file, or make it; at any moment there is the whole old one or the whole new one.

    Raises:
        CannotWriteError: the old one is still there.
    """
    with written_aside(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a path to write a file or a folder to, which takes the place of `path` in the end; nothing stays of it where that fails.

    Raises:
        CannotWriteError: what was at `path` is still there.
    """
    aside = path.with_name(ASIDE + path.name)
    try:
        with writing(path):
            _remove(aside)
            yield aside
            for file in [aside, *aside.rglob("*")] if aside.is_dir() else [aside]:
                sync(file)
            if path.is_dir():  # a folder does not take the place of a full one
                shutil.rmtree(path)
            os.replace(aside, path)
            sync(path.parent)
    finally:
        _remove(aside)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file; a reader sees all of it at once.

    Raises:
        CannotWriteError: the file is as it was.
    """
    content = line.encode() + b"\n"
    with writing(path):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            _write_or_take_back(file, content)
        finally:
            os.close(file)


def _write_or_take_back(file: int, content: bytes) -> None:
    before = os.fstat(file).st_size
    try:
        while content:  # a disk that becomes full takes a part first, and refuses the rest
            content = content[os.write(file, content) :]
    except OSError:
        os.ftruncate(file, before)
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    if os.name != "posix" and path.is_dir():
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove(aside: Path) -> None:
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
