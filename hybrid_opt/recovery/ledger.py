"""The ledger: records of steps in a file that only grows. Next: `checkpoint.py`.

One idea: a record is safe on disk before the next step begins, and says itself whether it is whole; so whatever happens, what can be read
from the beginning is true, and the rest is as if it had not happened.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_opt.errors import UserError
from hybrid_opt.run_files.durable import append_line, sync, writing

NAME, PACKED = "ledger.jsonl", "ledger.jsonl.gz"
FORMAT = 1
MARK = ',"crc32":"'
"""Comes after what the checksum is of, and before its 8 digits and `"}`."""
LONGEST = 1 << 26
"""Most bytes of a line; a damaged or made-up file is not to fill the memory."""


class Ledger:
    """A file of JSON lines: the first describes the model that the steps begin with, each other one is a step.

    Each line ends in a CRC-32 of what stands before it, and is written out to the disk at once. Steps that no record can bring back
    leave a gap; where weights were put back to earlier ones, a line says that there is a cut.

    Args:
        path: the file; it need not exist.
        model: what is written of the model in the first line, and must agree with what a file says already.
        writes: whether this is the process among several that writes; the others only count along.
    """

    def __init__(self, path: Path, model: Mapping[str, Any], *, writes: bool = True) -> None:
        self.path, self.model, self.writes = path, model, writes
        self.first = self.end = 0
        """Steps `first` to `end - 1` are the latest without a gap between them."""

    def begin(self) -> None:
        """Start a new file, before the run's first step."""
        self.first = self.end = 0
        if self.writes:
            self.path.unlink(missing_ok=True)
        self._write({"format": FORMAT, **self.model})

    def append(self, document: Mapping[str, Any]) -> None:
        """Record a step that comes after all that are recorded."""
        step = document["step"]
        assert step >= self.end, f"step {step} is recorded after step {self.end - 1}"
        self._write(document)
        self._count(step)

    def cut(self, step: int) -> None:
        """The steps from this one on do not begin where those before have ended."""
        self._write({"cut": step})
        self.first = self.end = step

    def go_on_at(self, step: int) -> None:
        """Forget the records from a step on, because it is taken again, and what a broken line has left at the end.

        Raises:
            UserError: the file is of another model.
        """
        self.first = self.end = kept = 0
        for line in whole_lines(self.path, self.model):
            if (line.step is not None and line.step >= step) or (line.cut is not None and line.cut > step):
                break
            if line.step is not None:
                self._count(line.step)
            elif line.cut is not None:
                self.first = self.end = line.cut
            kept = line.end
        if not self.writes:
            return
        if not kept:
            return self.begin()
        with writing(self.path), self.path.open("r+b") as file:
            file.truncate(kept)
            os.fsync(file.fileno())

    def reaches(self, first: int, end: int) -> bool:
        """Whether steps `first` to `end - 1` are recorded, the last of them being the latest."""
        return first == end or (self.first <= first and self.end == end)

    def _count(self, step: int) -> None:
        self.first = self.first if step == self.end else step
        self.end = step + 1

    def _write(self, document: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        append_line(self.path, encoded(document))
        sync(self.path)


@dataclass(frozen=True)
class Line:
    """A whole line of a ledger."""

    document: dict[str, Any]
    end: int
    """Bytes of the file until its end."""

    @property
    def step(self) -> int | None:
        """Which step it is; None in other lines."""
        return self.document.get("step")

    @property
    def cut(self) -> int | None:
        """Before which step there is a cut; None in other lines."""
        return self.document.get("cut")


def encoded(document: Mapping[str, Any]) -> str:
    """A line of a ledger, with its checksum."""
    body = json.dumps(document, separators=(",", ":"))[:-1]
    return f'{body}{MARK}{zlib.crc32(body.encode()):08x}"}}'


def whole_lines(path: Path, model: Mapping[str, Any] | None = None) -> Iterator[Line]:
    """The lines of a ledger, packed by gzip or not, up to the first that is cut off, changed or out of order.

    Args:
        model: see `Ledger`; None: not compared.

    Raises:
        UserError: the ledger is of another model or another format.
    """
    latest = None
    for line in _lines(path):
        if latest is None:
            _refuse_other_model(line.document, model, path)
            latest = -1
        elif isinstance(line.cut, int) and line.cut > latest:
            latest = line.cut - 1
        elif not isinstance(line.step, int) or line.step <= latest:
            return
        else:
            latest = line.step
        yield line


def read_steps(path: Path, first: int, end: int, model: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The documents of steps `first` to `end - 1`.

    Raises:
        UserError: one of them is missing or damaged, or the ledger is of another model.
    """
    expected = first
    for line in whole_lines(path, model) if first < end else ():
        if line.cut is not None and line.cut > first:
            break
        if line.step is None or line.step < first:
            continue
        if line.step != expected:
            break
        yield line.document
        expected += 1
        if expected == end:
            return
    if expected < end:
        raise UserError(f"{path}: the record of step {expected} is missing or damaged")


def _lines(path: Path) -> Iterator[Line]:
    end = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(LONGEST):
                end += len(line)
                if (document := _decoded(line)) is None:
                    return
                yield Line(document, end)
    except (FileNotFoundError, EOFError, gzip.BadGzipFile, zlib.error):  # gzip's words for what is cut off or damaged
        return


def _refuse_other_model(header: Mapping[str, Any], model: Mapping[str, Any] | None, path: Path) -> None:
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: its format is {header.get('format')!r}, but this version reads {FORMAT}")
    if model is None:
        return
    if header.get("parameters") != model["parameters"]:
        raise UserError(
            f"{path}: it tells of a model whose parameters have other names or shapes; use the model and the peft section that it was "
            "made with"
        )
    # Other ranks hold other parts, of which nothing can be said.
    if header.get("layout") == model["layout"] is not None and header.get("weights") != model["weights"]:
        raise UserError(
            f"{path}: it begins with other weights than the model has now; use the very model that it was made with (model.revision says "
            "which, if there are several)"
        )


def _decoded(line: bytes) -> dict[str, Any] | None:
    """What a line says; None if it is cut off or changed."""
    body, mark, rest = line.rpartition(MARK.encode())
    if not mark or rest != b'%08x"}\n' % zlib.crc32(body):
        return None
    try:
        document = json.loads(body + b"}")
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
