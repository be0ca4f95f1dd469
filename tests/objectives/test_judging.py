"""Reward functions that behave in every way there is."""

import asyncio
import contextlib
import math
import re
import threading
import time
import warnings
from functools import partial

import pytest
import torch

from hybrid_opt.errors import UserError
from hybrid_opt.objectives.judging import Judge, Judges
from hybrid_opt.objectives.time_limit import TimedOut, call_within

PROMPTS, COMPLETIONS = ["p0", "p1", "p2"], ["a", "bb", "ccc"]
COLUMNS = {"answer": ["a", "x", "ccc"]}


def judged(*functions, weights=None, on_error="worst", timeout=5.0, columns=COLUMNS):
    judges = [Judge(f"f{i}", f, w) for i, (f, w) in enumerate(zip(functions, weights or [1.0] * 9, strict=False))]
    return Judges(judges, on_error, timeout).judge(PROMPTS, COMPLETIONS, [[1], [2, 2], [3, 3, 3]], columns)


def length(completions, **kwargs):
    return [float(len(c)) for c in completions]


def exact(prompts, completions, answer, **kwargs):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


async def slowly(completions, **kwargs):
    await asyncio.sleep(0.3)
    return length(completions)


class Scorer:
    """A callable object, as TRL's reward models are wrapped."""

    def __call__(self, completion_ids, **kwargs):
        return torch.tensor([float(len(ids)) for ids in completion_ids])


def test_weighted_rewards_are_added():
    verdict = judged(length, exact, weights=[0.5, 2.0])
    assert verdict.totals == [0.5 + 2, 1.0, 1.5 + 2]
    assert verdict.rewards == {"f0": [1.0, 2.0, 3.0], "f1": [1.0, 0.0, 1.0]}
    assert verdict.errors == 0


def test_one_function_may_judge_twice():
    judges = [Judge("exact", partial(exact, answer=list(which))) for which in ("abc", ["x", "bb", "ccc"])]
    verdict = Judges(judges).judge(PROMPTS, COMPLETIONS, [[]] * 3, {})
    assert verdict.rewards == {"exact": [1.0, 0.0, 0.0], "exact 2": [0.0, 1.0, 1.0]}
    assert verdict.totals == [1.0, 1.0, 1.0]


def test_functions_get_what_they_take():
    seen = {}

    def nosy(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0, True, 2]  # whole numbers and truth values are numbers

    verdict = judged(nosy, Scorer(), lambda completions: [1] * 3, partial(exact, answer=["a"] * 3))
    assert seen == {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "completion_ids": [[1], [2, 2], [3, 3, 3]],
        **COLUMNS,
    }
    assert verdict.totals == [0 + 1 + 1 + 1, 1 + 2 + 1, 2 + 3 + 1]


def test_async_functions_run_at_the_same_time():
    begun = time.perf_counter()
    verdict = judged(slowly, length, slowly, slowly)
    assert time.perf_counter() - begun < 0.8
    assert verdict.totals == [4.0, 8.0, 12.0]


def test_async_functions_run_in_a_notebook_too():
    async def cell():
        return judged(slowly).totals

    assert asyncio.run(cell()) == [1.0, 2.0, 3.0]


def test_none_says_nothing():
    verdict = judged(length, lambda completions: [None, 1.0, None])
    assert verdict.totals == [1.0, 3.0, 3.0]
    assert math.isnan(judged(lambda completions: [None, 1.0, 1.0]).totals[0])
    assert judged(lambda completions: [None, 1.0, 1.0], on_error="zero").totals == [0.0, 1.0, 1.0]
    assert verdict.errors == 0


def bad(kind):
    def function(completions, **kwargs):
        if kind == "raises" and "bb" in completions:
            raise KeyError("bb")
        if kind == "exits" and "bb" in completions:
            raise SystemExit(1)
        value = {"nan": math.nan, "infinite": -math.inf, "text": "good", "list": [1.0]}.get(kind, 7.0)
        return [value if c == "bb" else 1.0 for c in completions]

    return function


@pytest.mark.parametrize("kind", ["raises", "exits", "nan", "infinite", "text", "list"])
def test_one_bad_completion_costs_the_others_nothing(kind):
    with pytest.warns(
        RuntimeWarning, match=r"reward function f1: .*'bb'. So it was for 1 of 3 completions; on_error is worst"
    ):
        verdict = judged(length, bad(kind))
    assert verdict.totals[::2] == [2.0, 4.0]
    assert math.isnan(verdict.totals[1])
    assert verdict.errors == 1
    with pytest.warns(RuntimeWarning, match="on_error is zero"):
        assert judged(length, bad(kind), on_error="zero").totals == [2.0, 2.0, 4.0]
    with pytest.raises(
        UserError, match=r"objective.rewards: reward function f1: .*'bb'; on_error: worst or zero would go on"
    ):
        judged(length, bad(kind), on_error="stop")


def test_an_async_function_that_raises_is_asked_again_one_by_one():
    async def fragile(completions, **kwargs):
        if "bb" in completions:
            raise ValueError("no")
        return [1.0] * len(completions)

    with pytest.warns(RuntimeWarning, match="ValueError: no"):
        verdict = judged(fragile)
    assert [verdict.totals[0], verdict.totals[2], verdict.errors] == [1.0, 1.0, 1]


@pytest.mark.parametrize("result", [[1.0], [1.0] * 4, 3.0, None])
def test_a_function_that_does_not_return_a_list_as_long_is_refused(result):
    with pytest.raises(UserError, match="f0 must return a list with one reward for each of the 3 completions"):
        judged(lambda completions: result)


def test_further_errors_are_counted_without_a_word():
    judges = Judges([Judge("f", bad("nan"))])
    with pytest.warns(RuntimeWarning):
        judges.judge(PROMPTS, COMPLETIONS, [[]] * 3, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert judges.judge(PROMPTS, COMPLETIONS, [[]] * 3, {}).errors == 1


def test_a_column_that_a_function_needs_must_be_there():
    judges = Judges([Judge("exact", exact)])
    judges.check(["question", "answer"])
    with pytest.raises(UserError, match="exact needs 'answer', which the data has no column for; columns: question"):
        judges.check(["question"])
    Judges([Judge("exact", partial(exact, answer="8"))]).check(["question"])


# ---------------------------------------------------------------- time


def sleeps(completions, **kwargs):
    time.sleep(30)


def searches(completions, **kwargs):
    re.match(r"(a+)+$", "a" * 60 + "!")


def counts(completions, **kwargs):
    while True:
        with contextlib.suppress(Exception):
            10 ** (10**7)


def clings(completions, **kwargs):
    while True:
        try:
            time.sleep(30)
        except:
            time.sleep(0.01)
            raise


async def awaits(completions, **kwargs):
    await asyncio.sleep(30)


@pytest.mark.parametrize("function", [sleeps, searches, counts, clings, awaits])
def test_a_function_that_hangs_is_left(function):
    begun = time.perf_counter()
    with pytest.warns(RuntimeWarning, match=r"took longer than the timeout of 0.2 s.*So it was for 3 of 3"):
        verdict = judged(length, function, timeout=0.2)
    assert time.perf_counter() - begun < 3
    assert all(map(math.isnan, verdict.totals))
    assert verdict.errors == 3


def test_the_limit_holds_outside_the_main_thread_too():
    outcome = []

    def run():
        try:
            call_within(0.1, lambda: time.sleep(5))
        except TimedOut as error:
            outcome.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(3)
    assert outcome == ["took longer than the timeout of 0.1 s"]


def test_the_limit_returns_and_raises_as_the_call_does():
    assert call_within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        call_within(5, lambda: 1 // 0)
    with pytest.raises(KeyboardInterrupt):
        call_within(5, lambda: exec("raise KeyboardInterrupt"))
    time.sleep(0.05)  # no alarm is left behind


def test_judges_of_one_name_keep_their_own_rewards_and_none_takes_a_measures_name():
    def constant(value):
        return lambda completions: [value] * len(completions)

    judges = Judges([Judge("fits", constant(1.0)), Judge("fits", constant(5.0), 2.0), Judge("reward", constant(0.5))])
    verdict = judges.judge(["p"], ["c"], [[1]], {})
    assert verdict.rewards == {"fits": [1.0], "fits 2": [5.0], "reward 2": [0.5]}
    assert verdict.totals == [11.5]
    assert [judge.name for judge in Judges([Judge("reward", constant(0.5))]).judges] == ["reward"]
