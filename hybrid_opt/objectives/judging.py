"""Calling reward functions: somebody else's code, which may raise, hang or return nonsense. Next: `time_limit.py`.

One idea: whatever a function does, each completion gets a reward or none, and none is counted. A function has TRL's signature,
`def reward(prompts, completions, **columns) -> list[float | None]`, sync or async; None says that it has nothing to say of a completion.
"""

import asyncio
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybrid_opt.errors import UserError
from hybrid_opt.objectives.time_limit import TimedOut, call_in_thread, call_within

RewardCall = Callable[..., Any]


@dataclass(frozen=True)
class Judge:
    """A reward function, with the weight of its rewards."""

    name: str
    function: RewardCall
    weight: float = 1.0
    needs: Sequence[str] = ()
    """Columns that it needs beside those that its signature names."""


@dataclass(frozen=True)
class Verdict:
    """What the judges say of completions."""

    totals: list[float]
    """Weighted sum of each completion's rewards; NaN where one went wrong, or where nobody had anything to say."""
    rewards: dict[str, list[float]]
    """Each judge's own rewards, not weighted; NaN where there is none."""
    errors: int
    """Rewards that went wrong."""


class Judges:
    """Several reward functions, whose weighted rewards are added.

    Args:
        on_error: what a reward is that is not finite, missing, late or raised: `worst` and NaN in the total, `zero` and 0, or
            `stop` and an error.
        timeout: most seconds for one call of a function.
    """

    def __init__(self, judges: Sequence[Judge], on_error: str = "worst", timeout: float = 60.0) -> None:
        self.judges, self.on_error, self.timeout = _told_apart(judges), on_error, timeout
        self._warned: set[str] = set()

    def check(self, columns: Sequence[str]) -> None:
        """Raise UserError for a function that needs an argument which is no column of the data."""
        for judge in self.judges:
            for name in [*judge.needs, *_required(judge.function)]:
                if name not in (*COMPLETED, *columns):
                    raise UserError(
                        f"objective.rewards: {judge.name} needs {name!r}, which the data has no column for; columns: "
                        f"{', '.join(columns)}; give it in the function's arguments, or add the column"
                    )

    def judge(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Verdict:
        """Rewards of completions.

        Raises:
            UserError: a function does not return one reward a completion, or something went wrong and `on_error` is `stop`.
        """
        data = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        rewards: dict[str, list[float]] = {}
        wrong = [False] * len(completions)
        errors = 0
        for judge, outcome in zip(self.judges, self._call(self.judges, data), strict=True):
            rewards[judge.name], failed = self._checked(judge, outcome, data)
            errors += len(failed)
            for row in failed:
                wrong[row] = wrong[row] or self.on_error == "worst"
        totals = [math.nan if wrong[i] else self._total(rewards, i) for i in range(len(completions))]
        return Verdict(totals, rewards, errors)

    def _total(self, rewards: Mapping[str, list[float]], row: int) -> float:
        said = [j.weight * rewards[j.name][row] for j in self.judges if not math.isnan(rewards[j.name][row])]
        return sum(said) if said else (0.0 if self.on_error == "zero" else math.nan)

    def _call(self, judges: Sequence[Judge], data: Mapping[str, Sequence[Any]]) -> list[Any]:
        """What each judge's function returned or raised; those that are async run at the same time."""
        waiting = [judge.function for judge in judges if _is_async(judge.function)]
        results = iter(_run_together(waiting, [_accepted(f, data) for f in waiting], self.timeout) if waiting else ())
        return [next(results) if _is_async(j.function) else self._outcome(j.function, data) for j in judges]

    def _outcome(self, function: RewardCall, data: Mapping[str, Sequence[Any]]) -> Any:
        try:
            return call_within(self.timeout, lambda: function(**_accepted(function, data)))
        except (Exception, SystemExit, TimedOut) as error:
            return error

    def _checked(self, judge: Judge, outcome: Any, data: Mapping[str, Sequence[Any]]) -> tuple[list[float], list[int]]:
        """A judge's rewards with NaN for none, and the numbers of the completions for which something went wrong."""
        count = len(data["completions"])
        # Asked again one by one, so that one completion does not cost the others theirs.
        if isinstance(outcome, (Exception, SystemExit)) and count > 1:
            outcome = [self._alone(judge, data, i) for i in range(count)]
        elif isinstance(outcome, BaseException):
            outcome = [outcome] * count
        values = _listed(judge.name, outcome, count)
        problems = {i: problem for i, value in enumerate(values) if (problem := _problem(value))}
        for i, problem in problems.items():
            self._tell(judge.name, problem, len(problems), count, data["completions"][i])
        zero = 0.0 if self.on_error == "zero" else math.nan
        rewards = [zero if i in problems else math.nan if v is None else float(v) for i, v in enumerate(values)]
        return rewards, list(problems)

    def _alone(self, judge: Judge, data: Mapping[str, Sequence[Any]], row: int) -> Any:
        own = {name: values[row : row + 1] for name, values in data.items()}
        (outcome,) = self._call([judge], own)
        return outcome if isinstance(outcome, BaseException) else _listed(judge.name, outcome, 1)[0]

    def _tell(self, name: str, problem: str, count: int, rows: int, completion: Any) -> None:
        text = f"reward function {name}: {problem}; the completion: {str(completion)[:80]!r}"
        if self.on_error == "stop":
            raise UserError(f"objective.rewards: {text}; on_error: worst or zero would go on")
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"{text}. So it was for {count} of {rows} completions; on_error is {self.on_error}, and the metrics count further ones",
                RuntimeWarning,
                stacklevel=2,
            )


def _told_apart(judges: Sequence[Judge]) -> list[Judge]:
    """The judges under names that no other judge and no other measure has, because rewards are kept by name."""
    taken, named = set(RESERVED if len(judges) > 1 else ()), []
    for judge in judges:
        names = itertools.chain([judge.name], (f"{judge.name} {i}" for i in itertools.count(2)))
        named.append(replace(judge, name=next(name for name in names if name not in taken)))
        taken.add(named[-1].name)
    return named


RESERVED = (
    *("loss", "reward", "finished", "completion_tokens", "reward_errors", "tied_pairs", "skipped", "nonfinite_members"),
    *("examples_left_out", "snr", "gradient_norm", "cosine", "rho2", "curvature", "guide_rho2", "fell_back"),
    "trust_factor",
)
"""What else is measured beside a judge's rewards."""
COMPLETED = ("prompts", "completions", "completion_ids")
"""What every function is offered beside the data's columns."""


def _required(function: RewardCall) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]


BLOCKED = 5.0
"""Seconds more for an async function that never awaits, which no loop can stop."""


def _accepted(function: RewardCall, data: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The arguments that a function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        bound = getattr(function, "keywords", {})
        return {name: values for name, values in data.items() if name not in bound}
    names = {p.name for p in parameters} - set(getattr(function, "keywords", {}))
    return {name: values for name, values in data.items() if name in names}


def _is_async(function: RewardCall) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _run_together(functions: Sequence[RewardCall], calls: Sequence[dict[str, Any]], timeout: float) -> list[Any]:
    """What async functions returned or raised."""

    async def limited(function: RewardCall, arguments: dict[str, Any]) -> Any:
        try:
            return await asyncio.wait_for(function(**arguments), timeout)
        except asyncio.TimeoutError:
            return TimedOut(timeout)

    async def together() -> list[Any]:
        calling = (limited(f, arguments) for f, arguments in zip(functions, calls, strict=True))
        return await asyncio.gather(*calling, return_exceptions=True)

    try:  # in a thread of its own, because a notebook has a loop that runs in this one already
        return call_in_thread(timeout + BLOCKED, lambda: asyncio.run(together()))
    except TimedOut as error:
        return [error] * len(functions)


def _listed(name: str, outcome: Any, count: int) -> list[Any]:
    try:
        values = list(outcome)
    except TypeError:
        values = None
    if values is None or len(values) != count:
        got = f"{len(values)} values" if values is not None else repr(outcome)[:80]
        raise UserError(
            f"objective.rewards: {name} must return a list with one reward for each of the {count} completions, not {got}"
        )
    return values


def _problem(value: Any) -> str:
    """What is wrong with a reward; empty if nothing is. None is no reward, and not wrong."""
    if value is None:
        return ""
    if isinstance(value, TimedOut):
        return str(value)
    if isinstance(value, BaseException):
        return f"raised {type(value).__name__}: {value}"
    try:
        return "" if math.isfinite(float(value)) else f"returned {value}"
    except (TypeError, ValueError, OverflowError):
        return f"returned {str(value)[:40]!r}, which is not a number"
