"""What is wrong with a configuration, in words for the person who wrote it. Next: `../training/build.py`.

One idea: a message begins with the file and the key that say the wrong thing, however late it is found.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from hybrid_opt.config import run as run_models
from hybrid_opt.config import schedule as schedule_models
from hybrid_opt.config import study as study_models
from hybrid_opt.config import tasks as task_models
from hybrid_opt.config import training as training_models
from hybrid_opt.config.run import RunFile
from hybrid_opt.config.schedule import ScheduleFile
from hybrid_opt.config.strict import Strict
from hybrid_opt.errors import UserError, did_you_mean

Config = TypeVar("Config", bound=BaseModel)
Source = Callable[[list[str]], tuple[str, list[str]]]
"""From the keys on the way to a value: the file that says it (or `command line`), and the keys in that file."""


@contextmanager
def located(source: Source) -> Iterator[None]:
    """A UserError whose message begins with a key gets the file in front that says it, like an error in validation."""
    try:
        yield
    except UserError as error:
        key, colon, rest = str(error).partition(": ")
        keys = key.split(".")
        keys = ["schedule", *keys] if keys[0] in ScheduleFile.model_fields else keys
        if not colon or keys[0] not in RunFile.model_fields:
            raise
        file, keys = source(keys)
        raise UserError(f"{file}: {'.'.join(keys)}: {rest}") from None


def validate(model: type[Config], document: dict[str, Any], source: Source) -> Config:
    """The model that a document describes.

    Raises:
        UserError: one line for each place that is wrong, with the file and the key in front.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        problems: dict[str, list[dict[str, Any]]] = {}
        for item, keys in _most_telling([(item, _document_keys(item["loc"], document)) for item in error.errors()]):
            file, loc = source(keys)
            problems.setdefault(f"{file}: {'.'.join(loc) + ': ' if loc else ''}", []).append(item)
        raise UserError("\n".join(f"{where}{_explain_all(items)}" for where, items in problems.items())) from None


def _most_telling(found: list[tuple[dict[str, Any], list[str]]]) -> list[tuple[dict[str, Any], list[str]]]:
    """Without what kinds that a value is not of say about the whole of it, where another kind has found something within."""
    return [
        (item, keys)
        for item, keys in found
        if not item["type"].endswith("_type")
        or not any(len(k) > len(keys) and k[: len(keys)] == keys for _, k in found)
    ]


def _explain_all(items: list[dict[str, Any]]) -> str:
    """A value that may be of several kinds has a problem with each; those of other kinds than its own say nothing."""
    own = [item for item in items if not item["type"].endswith(("_type", "literal_error"))]
    return ", or ".join(dict.fromkeys(_explain(item) for item in own or items))


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
        elif isinstance(place, dict) and part not in (place.get("type"), place.get("task")):
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
            if fields := _fields_of_kind(item["loc"]):
                near = did_you_mean(key, fields) or "; it has " + ", ".join(fields)
                return f"unknown key of {item['loc'][-2]}{near}"
            return f"unknown key{did_you_mean(key, [name for name in _field_names() if name != key])}"
        case "missing":
            return "missing; this key is required"
        case "union_tag_invalid":
            tag, expected = item["ctx"]["tag"], item["ctx"]["expected_tags"]
            return f"{_discriminator(item)} is {tag!r}; write one of {expected}{did_you_mean(tag, re.findall(r'[a-z_]+', expected))}"
        case "union_tag_not_found":
            kind = _discriminator(item)
            return f"{kind} is missing; say of which kind it is, or write the name of one that is there, got {_shown(given)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            # Within a union of other kinds too, pydantic puts the union's name last, and which key tells the kind is not said.
            in_union = item["type"] != "model_attributes_type" or key.startswith("tagged-union")
            hint = f"; write {{type: {given}}}" if not in_union and isinstance(given, str) else ""
            return f"expected keys and values{'' if in_union else ', one of them type'}, got {_shown(given)}{hint}"
        case "tuple_type":
            return f"expected a list, got {_shown(given)}; put it into [ ]"
        case "value_error":
            return item["msg"].removeprefix("Value error, ")
        case _:
            return f"{item['msg'][0].lower()}{item['msg'][1:]}, got {_shown(given)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _discriminator(item: dict[str, Any]) -> str:
    """The key that says which of several kinds a value is of: `type`, or `task`."""
    return item["ctx"]["discriminator"].strip("'")


def _keys_of(kind: Any) -> dict[str, Any]:
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}


def _fields_of_kind(loc: tuple[Any, ...]) -> list[str]:
    """Keys of the models whose `type` stands before the last key of pydantic's location."""
    kinds = [
        m
        for m in _subclasses(Strict)
        if "type" in m.model_fields and loc[-2:-1] == get_args(m.model_fields["type"].annotation)[:1]
    ]
    return list(dict.fromkeys(field for model in kinds for field in model.model_fields))


def _subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for child in model.__subclasses__():
        yield child
        yield from _subclasses(child)


def _field_names() -> list[str]:
    modules = (run_models, schedule_models, study_models, task_models, training_models)
    models = [
        m for module in modules for m in vars(module).values() if isinstance(m, type) and issubclass(m, BaseModel)
    ]
    return sorted({field for model in models for field in model.model_fields})
