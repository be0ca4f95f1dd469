"""Chains: the questions there are, and the reading of numbers."""

import re
from collections import Counter

import pytest

from hybrid_opt.config.tasks import Arithmetic
from hybrid_opt.errors import UserError
from hybrid_opt.tasks.arithmetic import arithmetic
from hybrid_opt.tasks.rows import rows_of

ONE_DIGIT = {"terms": 2, "largest": 9, "operators": "+"}


def rows(count: int, key: str = "data.train", **options) -> list[dict]:
    return rows_of(Arithmetic(task="arithmetic", rows=count, **options), key)


def test_all_one_digit_sums():
    made = rows(100, split="all", **ONE_DIGIT)
    assert {(r["question"], r["answer"]) for r in made} == {
        (f"{a} + {b}", str(a + b)) for a in range(10) for b in range(10)
    }


def test_the_space_is_split_for_good():
    train, held = rows(81, **ONE_DIGIT), rows(19, "data.validation", seed=5, **ONE_DIGIT)
    assert len({r["question"] for r in train + held}) == 100
    assert {r["question"] for r in rows(81, seed=9, **ONE_DIGIT)} == {r["question"] for r in train}
    assert rows(19, split="held_out", seed=5, **ONE_DIGIT) == held


@pytest.mark.parametrize(("count", "key", "possible"), [(82, "data.train", 81), (20, "data.validation", 19)])
def test_too_many_rows(count, key, possible):
    with pytest.raises(
        UserError, match=rf"^{key}\.rows: {count} rows .* only {possible} in the split .*; write rows: {possible}"
    ):
        rows(count, key, **ONE_DIGIT)


def test_rows_follow_from_the_seed():
    assert rows(50, seed=3) == rows(50, seed=3)
    assert rows(50, seed=3) == rows(80, seed=3)[:50]
    assert rows(50, seed=3) != rows(50, seed=4)


@pytest.mark.parametrize(
    "options",
    [{}, {"terms": 10, "smallest": 90, "operators": "*-+"}, {"terms": 5, "smallest": 7, "largest": 7, "operators": "+-*"},
     {"terms": 3, "largest": 999_999, "operators": "-"}],
)  # fmt: skip
def test_chains_are_as_asked_and_answers_right(options):
    """Python's evaluator sees only what was generated here."""
    task = Arithmetic(task="arithmetic", rows=60, **options)
    made = rows(60, **options)
    assert len({r["question"] for r in made}) == 60
    for row in made:
        assert re.fullmatch(r"\d+( [-+*] \d+)*", row["question"])
        numbers = [int(n) for n in re.findall(r"\d+", row["question"])]
        assert len(numbers) == task.terms
        assert task.smallest <= min(numbers) <= max(numbers) <= task.largest
        assert set(row["question"]) <= set(f"0123456789 {task.operators}")
        assert row["answer"] == str(eval(row["question"]))


def test_numbers_are_drawn_evenly():
    counts = Counter(n for r in rows(4000, largest=99) for n in r["question"].split()[::2])
    assert all(80 - 5 * 9 < counts[str(n)] < 80 + 5 * 9 for n in range(100))


@pytest.mark.parametrize(
    ("completion", "answer", "last", "number"),
    [
        ("8", "8", 1, 1), (" 8\n", "8", 1, 1), ("3 + 5 = 8", "8", 1, 0), ("8 is 3 + 5", "8", 0, 0), ("8.", "8", 1, 0), ("8.0", "8", 1, 1),
        ("008", "8", 1, 1), ("8.50", "8.5", 1, 1), ("8.5", "8", 0, 0), ("-8", "-8", 1, 1), ("-8", "8", 0, 0), ("\u22128", "-8", 1, 1),
        ("\u22128", "8", 0, 0), ("= -8", "-8", 1, 0), ("16-8", "8", 1, 0), ("16 - 8", "-8", 0, 0), ("16 -8", "-8", 1, 0), ("-0", "0", 1, 1),
        ("--8", "-8", 1, 0), ("8kg", "8", 0, 0), ("x8", "8", 0, 0), ("$8", "8", 1, 0), ("1,008", "8", 0, 0), ("1.0.8", "8", 0, 0),
        ("8e0", "8", 0, 0), ("1e8", "8", 0, 0), ("\u0668", "8", 0, 0), ("\u06668", "8", 0, 0), ("8\u0666", "8", 0, 0), ("\uff18", "8", 0, 0),
        ("", "8", 0, 0), ("eight", "8", 0, 0), ("8\u200b", "8", 1, 0), ("9" * 5000, "9" * 5000, 1, 1), ("9" * 10**6, "9" * 5000, 0, 0),
        ("1" + "0" * 10**6 + "8", "8", 0, 0), ("8", 8, 1, 1), ("8", None, None, None),
    ],
)  # fmt: skip
def test_reading(completion, answer, last, number):
    assert arithmetic(["?"], [completion], answer=[answer]) == [last]
    assert arithmetic(["?"], [completion], answer=[answer], form="number") == [number]


@pytest.mark.parametrize("answer", ["x", "", "8 apples", "\u0668", "1,008"])
def test_a_reference_that_is_no_number(answer):
    with pytest.raises(UserError, match=r"column 'answer' holds .*, which is no number; judge with exact_match"):
        arithmetic(["?"], ["no number either"], answer=[answer])
