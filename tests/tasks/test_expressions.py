"""Expressions: values against Python's own, and what is refused."""

import random
import sys
from fractions import Fraction

import pytest

from hybrid_opt.tasks.expressions import MOST_CHARACTERS, MOST_DIGITS, MOST_NUMBERS, ExpressionError, evaluate


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", 7, [7]),
        ("0", 0, [0]),
        (" 1 + 2 ", 3, [1, 2]),
        ("1+2*3", 7, [1, 2, 3]),
        ("(1+2)*3", 9, [1, 2, 3]),
        ("8-3-2", 3, [8, 3, 2]),
        ("8/4/2", 1, [8, 4, 2]),
        ("8/4*2", 4, [8, 4, 2]),
        ("1/3+1/3+1/3", 1, [1, 3, 1, 3, 1, 3]),
        ("1/2", Fraction(1, 2), [1, 2]),
        ("-3+5", 2, [3, 5]),
        ("-(2-5)*2", 6, [2, 5, 2]),
        ("2*-3", -6, [2, 3]),
        ("2*--3", 6, [2, 3]),
        ("2-+-3", 5, [2, 3]),
        ("6/-(1+1)", -3, [6, 1, 1]),
        ("(" * 10_000 + "1 + 2" + ")" * 10_000, 3, [1, 2]),
        ("-" * 10_001 + "1", -1, [1]),
        ("9" * MOST_DIGITS, 10**MOST_DIGITS - 1, [10**MOST_DIGITS - 1]),
        ("+".join("1" * MOST_NUMBERS), MOST_NUMBERS, [1] * MOST_NUMBERS),
        ("*".join(["9" * MOST_DIGITS] * MOST_NUMBERS), (10**MOST_DIGITS - 1) ** MOST_NUMBERS, [10**MOST_DIGITS - 1] * MOST_NUMBERS),
    ],
)  # fmt: skip
def test_values(text, value, numbers):
    assert evaluate(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "()", "(", ")", "(((", "1)", "(1", ")1(", "1 2", "1(2)", "(1)(2)", "(1)2", "+", "1+", "*1", "1*/2", "1+*2", "1**2",
        "4//2", "1/0", "1/(2-2)", "0/0", "1.5", "1e5", "1_000", "1,000", "0x10", "007", "00", "1\n+2", "1\t+2", "1+2;", "1+2=3",
        "x", "a+1", "1 if 1 else 2", "__import__('os')", "\u0661+\u0662", "\uff11", "1\u00b2", "\u22125", "5\u00d72", "1\u200b+2",
        "1\u00a0+2", "9" * (MOST_DIGITS + 1), "9" * 1_000_000, "+".join("1" * (MOST_NUMBERS + 1)), " " * MOST_CHARACTERS + "1",
        "9**9**9**9", "(" * 10_000 + "1" + ")" * 9_999, "(" * 9_999 + "1" + ")" * 10_000,
    ],
)  # fmt: skip
def test_what_is_no_expression(text):
    with pytest.raises(ExpressionError):
        evaluate(text)


def generated(generator: random.Random, depth: int) -> str:
    if depth == 0 or generator.random() < 0.2:
        return generator.choice(["", "", "-", "+"]) + str(generator.randrange(12))
    parts = [generated(generator, depth - 1) for _ in range(generator.randrange(2, 4))]
    text = parts[0] + "".join(generator.choice(["+", " - ", "*", " / "]) + part for part in parts[1:])
    return generator.choice([text, f"({text})", f"-({text})"])


def test_as_python_works_it_out():
    """Python's evaluator sees only what was generated here, with its numbers made fractions."""
    import re

    generator, zeros = random.Random(0), 0
    for _ in range(600):
        text = generated(generator, 3)
        try:
            expected = eval(re.sub(r"\d+", r"Fraction(\g<0>)", text), {"Fraction": Fraction})
        except ZeroDivisionError:
            zeros += 1
            with pytest.raises(ExpressionError):
                evaluate(text)
        else:
            assert evaluate(text)[0] == expected, text
    assert 0 < zeros < 200


def test_noise_is_worked_out_or_refused():
    generator, good = random.Random(1), 0
    for _ in range(20_000):
        text = "".join(generator.choices("0123 +-*/()", k=generator.randrange(1, 9)))
        try:
            value, numbers = evaluate(text)
        except ExpressionError:
            continue
        good += 1
        assert isinstance(value, Fraction)
        assert numbers
    assert good > 500


def test_no_recursion():
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(120)
        depth = 5_000
        assert evaluate("(1+" * 40 + "(" * depth + "2" + ")" * depth + ")" * 40)[0] == 42
    finally:
        sys.setrecursionlimit(limit)
