"""Checkpoints: everything the next step depends on, as safetensors and JSON. Next: `state_files.py`, then `keeping.py`.

One idea: a checkpoint is seen under its final name only when all of it is on the disk, and a manifest in it tells what it must be, so one
that is there and agrees with its manifest is as it was written. Those before it are there until it is.

    step-00000120/
      manifest.json      step, base, and of each file its size and SHA-256
      rank-0/            that rank's state: tensors.safetensors, values.json
      engine/            what only DeepSpeed can save

A light one has no weights; it has a base, the step of a snapshot (or 0, the model that the run began with) from which the ledger leads to it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hybrid_opt.engines.ranks import Ranks
from hybrid_opt.errors import UserError
from hybrid_opt.recovery.state_files import read_state, write_state
from hybrid_opt.run_files.durable import sync

MANIFEST = "manifest.json"
FORMAT = 1


class DamagedError(UserError):
    """A checkpoint is not as it was written."""


def save_checkpoint(
    folder: Path,
    step: int,
    ranks: Ranks,
    write: Callable[[Path], Mapping[str, Any]],
    *,
    base: int | None = None,
    keep: int = 1,
    marked: int | None = None,
) -> Path:
    """Write a state after `step` steps, then remove older checkpoints; to be called by all ranks.

    A whole one of this step that is there already stays: the run was resumed from it.

    Args:
        write: writes what it likes into the checkpoint, and returns the rest of this rank's state.
        base: of a light checkpoint.
        keep: how many of the latest checkpoints stay, and those that they are based on.
        marked: the step of one that stays too.
    """
    final, aside = place_of(folder, step), folder / f".{place_of(folder, step).name}"
    if ranks.any(ranks.rank == 0 and _is_whole(final)):
        return final
    if ranks.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    ranks.wait()
    write_state(_of_rank(aside, ranks.rank), write(aside))
    ranks.wait()
    if ranks.rank == 0:
        _write_manifest(aside, step, base)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        os.replace(aside, final)
        sync(folder)
        _remove_old(folder, keep, marked)
    ranks.wait()
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, whether damaged or not, the latest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """After how many steps it was made."""
    return int(checkpoint.name.removeprefix("step-"))


def verified(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint all of whose files are as they were written.

    Raises:
        DamagedError: one is not.
    """
    manifest = _manifest(checkpoint)
    for name, (size, digest) in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise DamagedError(f"{file} is missing")
        if file.stat().st_size != size or _digest(file) != digest:
            raise DamagedError(f"{file} is not as it was written")
    return manifest


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(verified(checkpoint))
    except DamagedError:
        return False


def base_of(checkpoint: Path) -> Path | None:
    """The snapshot that a light checkpoint is based on; the checkpoint itself if it is whole; None: the model at the run's start."""
    base = _manifest(checkpoint)["base"]
    return checkpoint if base is None else place_of(checkpoint.parent, base) if base else None


def load_checkpoint(checkpoint: Path, rank: int = 0) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote for a rank, completed by rank 0's; its tensors in main memory.

    Raises:
        DamagedError: a file is missing or damaged.
    """
    state: dict[str, Any] = {}
    read_state(_of_rank(checkpoint, 0), state)
    if rank and _of_rank(checkpoint, rank).exists():  # if not, there were fewer ranks, as rank 0's state tells
        read_state(_of_rank(checkpoint, rank), state)
    return state


def set_aside(checkpoint: Path) -> None:
    """Keep a damaged checkpoint under a name that nobody takes for one."""
    place = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(place, ignore_errors=True)
    checkpoint.rename(place)


def remove_checkpoints(folder: Path, *, light_only: bool = False) -> None:
    """Remove a folder of checkpoints that nobody needs any more; with `light_only` those with weights stay."""
    stay = set(filter(_has_weights, checkpoints(folder))) if light_only else ()
    for entry in folder.iterdir() if stay else ():
        if entry not in stay:
            shutil.rmtree(entry)
    if not stay:
        shutil.rmtree(folder, ignore_errors=True)


def _has_weights(checkpoint: Path) -> bool:
    try:
        return base_of(checkpoint) == checkpoint
    except DamagedError:
        return False


def _of_rank(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"rank-{rank}"


def _write_manifest(place: Path, step: int, base: int | None) -> None:
    """Describe what is there, once it is on the disk."""
    files = {str(file.relative_to(place)): [file.stat().st_size, _digest(file)] for file in _files(place)}
    manifest = {"format": FORMAT, "step": step, "base": base, "files": files}
    (place / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for entry in (*_files(place), *(entry for entry in place.rglob("*") if entry.is_dir()), place):
        sync(entry)


def _manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
        base = manifest["base"]
        if manifest["format"] != FORMAT or manifest["step"] != step_of(checkpoint) or not isinstance(base, int | None):
            raise ValueError("it is of another format or step")
        if any(not (checkpoint / name).resolve().is_relative_to(checkpoint.resolve()) for name in files):
            raise ValueError("it names a file outside the checkpoint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{checkpoint / MANIFEST} cannot be read: {error}") from None
    return {**manifest, "files": files}


def _remove_old(folder: Path, keep: int, marked: int | None) -> None:
    """All but the latest, what they are based on, and the marked one; a damaged manifest says nothing, so what it may be based on stays too."""
    latest, older = checkpoints(folder)[:keep], checkpoints(folder)[keep:]
    needed = set() if marked is None else {place_of(folder, marked)}
    for checkpoint in latest:
        try:
            needed.add(base_of(checkpoint))
        except DamagedError:
            return
    for checkpoint in older:
        if checkpoint not in needed:
            shutil.rmtree(checkpoint)


def _files(place: Path) -> Iterator[Path]:
    return (entry for entry in sorted(place.rglob("*")) if entry.is_file() and entry.name != MANIFEST)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
