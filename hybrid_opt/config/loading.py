"""From YAML files and `section.field=value` arguments to a validated configuration, with errors that say where.

One idea: files are read into plain dictionaries, put together, overridden, and only then validated, so that an
override is checked exactly as if it stood in the file. Next: `explaining.py`, then `../training/build.py`.
"""

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hybrid_opt.config.explaining import Source, validate
from hybrid_opt.config.run import RunFile
from hybrid_opt.config.schedule import ScheduleFile
from hybrid_opt.config.study import StudyFile
from hybrid_opt.config.yaml_text import parse_yaml, read_yaml
from hybrid_opt.errors import UserError, did_you_mean

# ---------------------------------------------------------------- shipped recipes


def recipes() -> dict[str, Path]:
    """Shipped schedule files by name."""
    package = Path(__file__).parents[1]
    # An installed package carries the recipes inside; in a checkout they lie beside it, where people look for them.
    folder = package / "schedules" if (package / "schedules").is_dir() else package.parent / "schedules"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_schedule(name: str, *folders: Path) -> Path:
    """Path of a schedule file given as a path (from here, or from one of the folders) or as a shipped recipe's name.

    Raises:
        UserError: there is neither such a file nor such a recipe.
    """
    for path in (Path(name), *(folder / name for folder in folders)):
        if os.path.isfile(path):  # False too for a name that no file can have
            return path
    shipped = recipes()
    if name in shipped:
        return shipped[name]
    raise UserError(
        f"schedule: {name!r} is neither a file nor a shipped recipe{did_you_mean(Path(name).stem, shipped)}; "
        f"shipped: {', '.join(shipped)}"
    )


# ---------------------------------------------------------------- the two files

Change = tuple[list[str], Any]
"""Keys on the way to a value, and the value to put there."""


def load_schedule(source: str | Path | dict[str, Any] | ScheduleFile) -> ScheduleFile:
    """A schedule from a path, a shipped recipe's name, a dictionary, or a ScheduleFile as it is.

    Raises:
        UserError: the file is missing or says something invalid; the message names file and key.
    """
    if isinstance(source, ScheduleFile):
        return source
    if isinstance(source, dict):
        return validate(ScheduleFile, source, lambda loc: ("schedule", loc))
    path = find_schedule(str(source))
    return validate(ScheduleFile, read_yaml(path), lambda loc: (str(path), loc))


def load_run(path: str | Path, overrides: Sequence[str] = (), schedule: str | None = None) -> RunFile:
    """A run file with its schedule file in place and overrides applied.

    Args:
        path: the run file. File names in it are looked up from the current folder, then from the run file's folder.
        overrides: `section.field=value`, the value in YAML; `schedule.…` reaches into the schedule file.
        schedule: path or recipe name that takes the place of the run file's own `schedule`.

    Raises:
        UserError: naming the file and the key, or the argument, that is wrong.
    """
    return load_run_and_source(path, overrides, schedule)[0]


def load_run_and_source(path: str | Path, overrides: Sequence[str], schedule: str | None) -> tuple[RunFile, Source]:
    """What `load_run` gives, and where each key of it was written, for messages about what is found wrong later."""
    changes = [parse_override(text) for text in overrides]
    changes += [(["schedule"], schedule)] if schedule else []
    changes.sort(key=lambda change: change[0] != ["schedule"])  # in whatever order they are given, the file comes first
    return load_changed(path, changes)


def load_changed(
    path: str | Path,
    changes: Sequence[Change],
    *,
    said_in: str = "command line",
    beside: Sequence[Path] = (),
    read: Callable[[Path], dict[str, Any]] = read_yaml,
) -> tuple[RunFile, Source]:
    """A run file with changes, made one after the other; a whole new schedule undoes earlier changes of the schedule.

    Args:
        said_in: what to name in messages as the origin of the changes.
        read: gives the mapping in a YAML file, which stays as it is.
        beside: folders in which to look for files, beside the current one and the run file's.

    Raises:
        UserError: naming the file and the key, or the change, that is wrong.
    """
    path = Path(path)
    document, folders = copy.deepcopy(read(path)), [*beside, path.parent]
    last = max((i for i, (keys, _) in enumerate(changes) if keys == ["schedule"]), default=-1)
    chosen = changes[last][1] if last >= 0 else document.get("schedule")
    changes = [c for i, c in enumerate(changes) if c[0] != ["schedule"] and (i > last or c[0][0] != "schedule")]
    written_in_change, schedule_path = last >= 0 and isinstance(chosen, dict), None
    if isinstance(chosen, str):
        try:
            schedule_path = find_schedule(chosen, *folders)
        except UserError as error:
            raise UserError(f"{path if last < 0 else said_in}: {error}") from None
        chosen = read(schedule_path)
    if chosen is not None:
        document["schedule"] = copy.deepcopy(chosen)
    for keys, value in changes:
        _override(document, keys, copy.deepcopy(value), said_in)
    _find_files(document, folders)

    def source(loc: list[str]) -> tuple[str, list[str]]:
        whole = loc
        if any(loc[: len(keys)] == keys for keys, _ in changes) or (loc[:1] == ["schedule"] and written_in_change):
            return said_in, loc
        file, loc = (str(schedule_path), loc[1:]) if schedule_path and loc[:1] == ["schedule"] else (str(path), loc)
        # What is wrong with a whole section may come from either.
        changed = any(whole and keys[: len(whole)] == whole for keys, _ in changes)
        return f"{file} or {said_in}" if changed else file, loc

    return validate(RunFile, document, source), source


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyFile:
    """A study file with overrides (`budgets=[{seconds: 60}]`) applied.

    Raises:
        UserError: naming the file and the key, or the argument, that is wrong.
    """
    document, changes = read_yaml(Path(path)), [parse_override(text) for text in overrides]
    for keys, value in changes:
        _override(document, keys, value)

    def source(loc: list[str]) -> tuple[str, list[str]]:
        return "command line" if any(loc[: len(keys)] == keys for keys, _ in changes) else str(path), loc

    return validate(StudyFile, document, source)


def parse_override(text: str) -> Change:
    """`section.field=value` in parts."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"command line: {text!r} is not of the form section.field=value, such as training.steps=10")
    return key.split("."), parse_yaml(value, f"command line: {text!r}")


def _override(document: dict[str, Any], keys: list[str], value: Any, said_in: str = "command line") -> None:
    place: Any = document
    for depth, key in enumerate(keys[:-1]):
        if isinstance(place, list) and key in map(str, range(len(place))):
            place = place[int(key)]
        elif isinstance(place, dict):
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
        else:
            raise UserError(f"{said_in}: {'.'.join(keys)}: {'.'.join(keys[:depth])} has no field {key!r}")
    if isinstance(place, list) and keys[-1] in map(str, range(len(place))):
        place[int(keys[-1])] = value
    elif isinstance(place, dict):
        place[keys[-1]] = value
    else:
        raise UserError(f"{said_in}: {'.'.join(keys)}: {'.'.join(keys[:-1])} has no field {keys[-1]!r}")


FILES = (("data", "train"), ("data", "validation"), ("model", "name"), ("model", "tokenizer"))
"""Keys whose values may be names of files."""


def flat(tree: dict[str, Any], way: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a document, by keys as overrides write them: `training.steps`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{way}{key}.")
        else:
            yield f"{way}{key}", value


def differences(saved: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys at which two configurations differ, with both values (None: absent)."""
    before, after = dict(flat(saved)), dict(flat(now))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield key, before.get(key), after.get(key)


def _find_files(document: dict[str, Any], folders: Sequence[Path]) -> None:
    """Names of existing files in one of the folders become paths from here."""
    own = document.get("objectives")
    parts = [document, *(own.values() if isinstance(own, dict) else ())]
    for part, (section, key) in itertools.product((p for p in parts if isinstance(p, dict)), FILES):
        values = part.get(section)
        name = values.get(key) if isinstance(values, dict) else None
        if name and isinstance(name, str) and not os.path.exists(name):
            values[key] = next((str(folder / name) for folder in folders if os.path.exists(folder / name)), name)
