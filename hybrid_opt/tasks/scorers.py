"""The built-in scorers by name, with their options bound and checked. Next: `exact_match.py`.

One idea: a scorer is a plain reward function in TRL's signature, so it can be used anywhere; its options are its parameters with
a default, and the columns it needs are those without.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from hybrid_opt.errors import UserError, did_you_mean
from hybrid_opt.tasks.arithmetic import arithmetic
from hybrid_opt.tasks.conciseness import conciseness
from hybrid_opt.tasks.countdown import countdown
from hybrid_opt.tasks.exact_match import exact_match
from hybrid_opt.tasks.multiple_choice import multiple_choice
from hybrid_opt.tasks.reasoning_gym import reasoning_gym

Scorer = Callable[..., list[float | None]]
SCORERS: dict[str, Scorer] = {
    scorer.__name__: scorer
    for scorer in (exact_match, multiple_choice, countdown, arithmetic, conciseness, reasoning_gym)
}


def scorer(name: str, arguments: Mapping[str, Any], key: str = "objective.rewards") -> Scorer:
    """The scorer of a name with its options bound.

    Args:
        arguments: options by name.
        key: where in the run file the two were written, for messages.

    Returns:
        `function(prompts=..., completions=..., **columns)`, a list of one reward a completion; it can be pickled.

    Raises:
        UserError: there is no such scorer or option, or a value does not suit the option.
    """
    function = _known(name, key)
    return partial(_call, function, {**options(function), **_checked(function, arguments, key)})


def needed_columns(name: str, arguments: Mapping[str, Any], key: str = "objective.rewards") -> list[str]:
    """The columns of the data that a scorer reads.

    Raises:
        UserError: as for `scorer`.
    """
    function = _known(name, key)
    named = {**options(function), **_checked(function, arguments, key)}.get("column")
    parameters = list(inspect.signature(function).parameters.values())[2:]
    return [
        *([] if named is None else [named]),
        *(p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD),
    ]


def options(function: Scorer) -> dict[str, Any]:
    """A scorer's options with their defaults."""
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.default is not p.empty}


def _call(function: Scorer, bound: dict[str, Any], /, prompts: Any, completions: Any, **columns: Any) -> Any:
    # A column may be named like an option (choices, say): the option wins, or data would decide how it is judged.
    return function(prompts, completions, **{**columns, **bound})


def _known(name: str, key: str) -> Scorer:
    if name not in SCORERS:
        raise UserError(
            f"{key}.function: there is no built-in scorer {name!r}{did_you_mean(name, SCORERS)}; write one of "
            f"{', '.join(SCORERS)}, or module:function for one of your own"
        )
    return SCORERS[name]


def _checked(function: Scorer, arguments: Mapping[str, Any], key: str) -> dict[str, Any]:
    hints, checked = get_type_hints(function, include_extras=True), {}
    for option, value in arguments.items():
        if option not in options(function):
            known = ", ".join(options(function)) or "none"
            raise UserError(
                f"{key}.arguments.{option}: {function.__name__} has no such option{did_you_mean(option, options(function))}; "
                f"options: {known}"
            )
        try:
            checked[option] = TypeAdapter(hints[option]).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise UserError(f"{key}.arguments.{option}: {problem}, got {value!r}") from None
    if (column := checked.get("column")) in options(function):
        raise UserError(
            f"{key}.arguments.column: {column!r} is also the name of an option; rename that column in the data"
        )
    return checked
