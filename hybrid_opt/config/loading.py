"""From YAML files and `section.field=value` arguments to a validated configuration, with errors that say where.

One idea: files are read into plain dictionaries, put together, overridden, and only then validated, so that an
override is checked exactly as if it stood in the file. Next: `../training/build.py`, which builds what was configured.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from hybrid_opt.config import run as run_models
from hybrid_opt.config import schedule as schedule_models
from hybrid_opt.config.run import RunFile
from hybrid_opt.config.schedule import ScheduleFile
from hybrid_opt.errors import UserError, did_you_mean

Config = TypeVar("Config", bound=BaseModel)


# ---------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice and reads `3e-5` as a number, as YAML 1.2 does."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, (key_node, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
        return super().construct_mapping(node, deep)


YAML_12_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))
"""Tag, form and first characters of numbers such as 3e-5, which YAML 1.1 takes for texts."""
_Loader.add_implicit_resolver(*YAML_12_FLOAT)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {_yaml_problem(error)}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected keys and values such as 'output: runs/one', found {_kind(document)}")
    return document


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}{getattr(error, 'problem', None) or str(error).splitlines()[0]}"


def _kind(value: Any) -> str:
    names = {type(None): "nothing", list: "a list", str: "a text", dict: "keys and values"}
    return names.get(type(value), f"a {type(value).__name__}")


# ---------------------------------------------------------------- shipped recipes


def recipes() -> dict[str, Path]:
    """Shipped schedule files by name."""
    package = Path(__file__).parents[1]
    # An installed package carries the recipes inside; in a checkout they lie beside it, where people look for them.
    folder = package / "schedules" if (package / "schedules").is_dir() else package.parent / "schedules"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_schedule(name: str, near: Path = Path()) -> Path:
    """Path of a schedule file given as a path (from here, or from the folder `near`) or as a shipped recipe's name.

    Raises:
        UserError: there is neither such a file nor such a recipe.
    """
    for path in (Path(name), near / name):
        if path.is_file():
            return path
    shipped = recipes()
    if name in shipped:
        return shipped[name]
    raise UserError(
        f"schedule: {name!r} is neither a file nor a shipped recipe{did_you_mean(Path(name).stem, shipped)}; "
        f"shipped: {', '.join(shipped)}"
    )


# ---------------------------------------------------------------- the two files


def load_schedule(source: str | Path | dict[str, Any] | ScheduleFile) -> ScheduleFile:
    """A schedule from a path, a shipped recipe's name, a dictionary, or a ScheduleFile as it is.

    Raises:
        UserError: the file is missing or says something invalid; the message names file and key.
    """
    if isinstance(source, ScheduleFile):
        return source
    if isinstance(source, dict):
        return _validate(ScheduleFile, source, lambda loc: ("schedule", loc))
    path = find_schedule(str(source))
    return _validate(ScheduleFile, read_yaml(path), lambda loc: (str(path), loc))


def load_run(path: str | Path, overrides: list[str] | tuple[str, ...] = (), schedule: str | None = None) -> RunFile:
    """A run file with its schedule file in place and overrides applied.

    Args:
        path: the run file. File names in it are looked up from the current folder, then from the run file's folder.
        overrides: `section.field=value`, the value in YAML; `schedule.…` reaches into the schedule file.
        schedule: path or recipe name that takes the place of the run file's own `schedule`.

    Raises:
        UserError: naming the file and the key, or the argument, that is wrong.
    """
    path = Path(path)
    document = read_yaml(path)
    changes = [_parse_override(text) for text in overrides]
    chosen = schedule or next((v for keys, v in changes if keys == ["schedule"]), document.get("schedule"))
    changes = [(keys, value) for keys, value in changes if keys != ["schedule"]]
    schedule_path = None
    if isinstance(chosen, str):
        try:
            schedule_path = find_schedule(chosen, path.parent)
        except UserError as error:
            raise UserError(f"{path if chosen == document.get('schedule') else 'command line'}: {error}") from None
        chosen = read_yaml(schedule_path)
    if chosen is not None:
        document["schedule"] = chosen
    for keys, value in changes:
        _override(document, keys, value)
    _find_files(document, path.parent)

    def source(loc: list[str]) -> tuple[str, list[str]]:
        whole = loc
        if any(loc[: len(keys)] == keys for keys, _ in changes):
            return "command line", loc
        file, loc = (str(schedule_path), loc[1:]) if schedule_path and loc[:1] == ["schedule"] else (str(path), loc)
        # What is wrong with a whole section may come from either.
        changed = any(whole and keys[: len(whole)] == whole for keys, _ in changes)
        return f"{file} or command line" if changed else file, loc

    run = _validate(RunFile, document, source)
    run._source = source
    return run


@contextmanager
def located(run: RunFile) -> Iterator[None]:
    """A UserError whose message begins with a key gets the file in front that says it, like an error in validation."""
    try:
        yield
    except UserError as error:
        key, colon, rest = str(error).partition(": ")
        keys = key.split(".")
        keys = ["schedule", *keys] if keys[0] in ScheduleFile.model_fields else keys
        if not colon or keys[0] not in RunFile.model_fields or run._source is None:
            raise
        file, keys = run._source(keys)
        raise UserError(f"{file}: {'.'.join(keys)}: {rest}") from None


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"command line: {text!r} is not of the form section.field=value, such as training.steps=10")
    try:
        return key.split("."), yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"command line: {text!r}: {_yaml_problem(error)}") from None


def _override(document: dict[str, Any], keys: list[str], value: Any) -> None:
    place: Any = document
    for depth, key in enumerate(keys[:-1]):
        if isinstance(place, list) and key.isdigit() and int(key) < len(place):
            place = place[int(key)]
        elif isinstance(place, dict):
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
        else:
            raise UserError(f"command line: {'.'.join(keys)}: {'.'.join(keys[:depth])} has no field {key!r}")
    if isinstance(place, list) and keys[-1].isdigit() and int(keys[-1]) < len(place):
        place[int(keys[-1])] = value
    elif isinstance(place, dict):
        place[keys[-1]] = value
    else:
        raise UserError(f"command line: {'.'.join(keys)}: {'.'.join(keys[:-1])} has no field {keys[-1]!r}")


def _find_files(document: dict[str, Any], folder: Path) -> None:
    """Names of existing files beside the run file become paths from here."""
    for section, key in (("data", "train"), ("data", "validation"), ("model", "name"), ("model", "tokenizer")):
        values = document.get(section)
        if isinstance(values, dict) and isinstance(name := values.get(key), str):
            if not Path(name).exists() and (folder / name).exists():
                values[key] = str(folder / name)


# ---------------------------------------------------------------- errors


def _validate(model: type[Config], document: dict[str, Any], source) -> Config:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}  # a value that may be of several kinds has a problem with each
        for item in error.errors():
            file, loc = source(_document_keys(item["loc"], document))
            problems.setdefault(f"{file}: {'.'.join(loc) + ': ' if loc else ''}", []).append(_explain(item))
        raise UserError(
            "\n".join(where + ", or ".join(dict.fromkeys(what)) for where, what in problems.items())
        ) from None


def _document_keys(loc: tuple[Any, ...], document: Any) -> list[str]:
    """The keys a user wrote: pydantic's location without the tags and type names that it puts between them."""
    keys, place = [], document
    for i, part in enumerate(loc):
        if (isinstance(place, dict) and part in place) or (
            isinstance(place, list) and isinstance(part, int) and part < len(place)
        ):
            place = place[part]
        elif i < len(loc) - 1 or not isinstance(part, str) or not re.fullmatch(r"[a-z_]\w*", part):
            continue  # a union's tag or type, such as 'es' or 'constrained-str'
        elif isinstance(place, dict) and part != place.get("type"):
            pass  # a missing key
        else:
            continue
        keys.append(str(part))
    return keys


def _explain(item: dict[str, Any]) -> str:
    key, given = str(item["loc"][-1]) if item["loc"] else "", item["input"]
    match item["type"]:
        case "extra_forbidden":
            if homes := [f"{s}.{key}" for s, f in RunFile.model_fields.items() if key in _keys_of(f.annotation)]:
                return f"unknown key here; it belongs in {homes[0]}"
            return f"unknown key{did_you_mean(key, _field_names() - {key})}"
        case "missing":
            return "missing; this key is required"
        case "union_tag_invalid":
            tag, expected = item["ctx"]["tag"], item["ctx"]["expected_tags"]
            return f"type is {tag!r}; write one of {expected}{did_you_mean(tag, re.findall(r'[a-z_]+', expected))}"
        case "union_tag_not_found":
            return f"expected keys with a type among {_tags(item)}, got {_shown(given)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            typed = ", one of them type" if item["type"] == "model_attributes_type" else ""
            return f"expected keys and values{typed}, got {_shown(given)}"
        case "tuple_type":
            return f"expected a list, got {_shown(given)}"
        case "value_error":
            return item["msg"].removeprefix("Value error, ")
        case _:
            return f"{item['msg'][0].lower()}{item['msg'][1:]}, got {_shown(given)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _tags(item: dict[str, Any]) -> str:
    return item["ctx"].get("expected_tags", "those that `hybrid-opt schema` lists")


def _keys_of(kind: Any) -> dict[str, Any]:
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}


def _field_names() -> set[str]:
    modules = (run_models, schedule_models)
    models = [
        m for module in modules for m in vars(module).values() if isinstance(m, type) and issubclass(m, BaseModel)
    ]
    return {field for model in models for field in model.model_fields}
