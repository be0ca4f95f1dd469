"""Which tasks of reasoning-gym are not offered, and why. Next: `reasoning_gym_rows.py`.

One idea: whether a scorer evaluates text is read off its code, as it is installed, so that one added by a later version is
refused too. What cannot be read off is listed by name.
"""

from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

EVALUATING = frozenset(
    {"eval", "exec", "literal_eval", "sympify", "parse_expr", "parse_latex", "parse_mathematica", "lambdify"}
)
"""Functions of Python and sympy that work out a text, most of them by executing it."""

LISTED = {
    "arc_agi": "its scorer compares Python tuples, which data cannot hold",
    "codeio": "its rows come from executing programs that a model wrote",
    "coin_flip": "its scorer takes hours for an answer such as 1e999999999",
    "complex_arithmetic": "its scorer gives the full reward to the answer nan",
    "composite": "it mixes other tasks; name one of them",
    "game_of_life_halting": "its scorer takes every answer but an empty one for True",
    "propositional_logic": "its scorer takes minutes for a long formula",
    "rearc": "its scorer compares Python tuples, which data cannot hold",
    "rubiks_cube": "its scorer takes hours for an answer such as R999999999",
    "rush_hour": "its scorer takes hours for an answer such as A+999999999",
}
"""As found in version 0.1.25."""


def refused(name: str, dataset: type) -> str | None:
    """Why a task is not offered; None: it is.

    Args:
        dataset: the task's class in reasoning-gym.
    """
    if calls := sorted(evaluating_calls(dataset)):
        return f"its scorer calls {' and '.join(calls)}, and text that a model wrote must not be evaluated"
    return LISTED.get(name)


def evaluating_calls(dataset: type) -> set[str]:
    """Functions of EVALUATING that the class's `score_answer` names, or any code of the package that it leads to.

    A name that stands for a function or class of the package leads to its code; `self.method` leads to the class's own.
    """
    package = dataset.score_answer.__module__.partition(".")[0]
    found: set[str] = set()
    waiting, seen = [dataset.score_answer], set()
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        for name in _names(function.__code__):
            own = _of_package(function.__globals__.get(name, getattr(dataset, name, None)), package)
            modules = (
                v for v in function.__globals__.values() if isinstance(v, ModuleType) and _inside(v.__name__, package)
            )
            own += [f for module in modules for f in _of_package(vars(module).get(name), package)]
            waiting += own
            if name in EVALUATING and not own:
                found.add(name)
    return found


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _of_package(value: Any, package: str) -> list[FunctionType]:
    """The functions that a value stands for, if the package defines it."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    if not _inside(getattr(value, "__module__", None) or "", package):
        return []
    if isinstance(value, FunctionType):
        return [value]
    members = vars(value).values() if isinstance(value, type) else ()
    return [function for member in members for function in _functions(member)]


def _functions(member: Any) -> list[FunctionType]:
    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return [member] if isinstance(member, FunctionType) else []


def _inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")
