"""Countdown: rewards by the rule of ES at Scale, and rows that can all be solved."""

import itertools
from fractions import Fraction

import pytest

from hybrid_opt.config.tasks import Countdown
from hybrid_opt.errors import UserError
from hybrid_opt.tasks.countdown import answer_score, countdown, format_score
from hybrid_opt.tasks.expressions import evaluate
from hybrid_opt.tasks.rows import rows_of


def rows(count: int, key: str = "data.train", **options) -> list[dict]:
    return rows_of(Countdown(task="countdown", rows=count, **options), key)


# ---------------------------------------------------------------- rewards

RIGHT = "<answer>(1 + 2) * 3</answer>"
FORMATS = {
    f"<think>so</think>\n{RIGHT}": 1,
    f"<think></think>\n{RIGHT}\n": 1,
    "<think></think>\n<answer></answer>": 1,
    f"<think>a</think>\nb</think>\n{RIGHT}": 1,
    f"<think>a</think>\n<answer>1</answer>\n{RIGHT}": 1,
    f"<think>a\nb\n\nc</think>\n{RIGHT}": 1,
    f"<think>so</think>{RIGHT}": 0.6,
    f"<think>so</think>\n\n{RIGHT}": 0.6,
    f"<think>so</think>\n{RIGHT}.": 0.6,
    f"<think>so</think>\n{RIGHT}\n\n": 0.6,
    f" <think>so</think>\n{RIGHT}": 0.6,
    f"{RIGHT}<think>so</think>": 0.6,
    f"<think>so\n{RIGHT}": 0.5,
    f"so</think>\n{RIGHT}": 0.5,
    "</answer><answer>": 0,
    "<think>so</think>\n<answer>": 0.1,
    "<think>so</think>\n</answer>": 0.1,
    "<think>so</think>": 0.1,
    "</think><think>": 0,
    "<THINK></THINK>": 0,
    "": 0,
}


@pytest.mark.parametrize(("text", "score"), FORMATS.items())
def test_format(text, score):
    assert format_score(text) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("(1 + 2) * 3", 1), ("3*(2+1)", 1), (" (1+2)*3\n", 1), ("3*2*1+3", 0), ("1+2*3", 0), ("9", 0), ("(1+2)*3+0", 0),
        ("1*2*3", 0), ("12-3", 0), ("3+3+3", 0), ("(1+2)", 0), ("(1 + 2) * 3 = 9", 0), ("(1+2)\n*3", 0), ("(1+2)x3", 0), ("-(1+2)*-3", 1),
        ("(1+2)*3**1", 0), ("(1+2)*03", 0), ("(1+2)*3.0", 0), ("\uff08" "1+2)*3", 0), ("(\u0661+2)*3", 0), ("(1+2)\u200b*3", 0), ("3/(1/3)", 0),
        ("(" * 10_000 + "1+2" + ")" * 10_000 + "*3", 1), ("(" * 10_001 + "1+2" + ")" * 10_000 + "*3", 0), ("__import__('os')", 0), ("", 0),
    ],
)  # fmt: skip
def test_answer(answer, score):
    assert answer_score(f"<answer>{answer}</answer>", [1, 2, 3], 9) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (RIGHT, 1), (f"<answer>1</answer>{RIGHT}", 1), (f"{RIGHT}<answer>1</answer>", 0), (f"{RIGHT}<answer>1", 1), (f"<answer>{RIGHT}</answer>", 0),
        ("(1 + 2) * 3", 0), ("<answer>(1 + 2) * 3", 0),
    ],
)  # fmt: skip
def test_the_last_whole_answer_counts(text, score):
    assert answer_score(text, [3, 1, 2], 9) == score


def test_values_are_exact():
    """1/3 three times is 1, and what misses by 1e-11 is missed."""
    assert answer_score("<answer>1/3+1/3+1/3</answer>", [1, 3, 1, 3, 1, 3], 1) == 1
    assert answer_score("<answer>1 + 1/100000000000</answer>", [1, 1, 100_000_000_000], 1) == 0


@pytest.mark.parametrize(
    ("prompt", "completion", "reward"),
    [
        ("...\n<think>", f"so</think>\n{RIGHT}", 1.1),
        ("...\n<think>\n", f"so</think>\n{RIGHT}", 1.1),
        ("...", f"<think>so</think>\n{RIGHT}", 1.1),
        ("...", f"so</think>\n{RIGHT}", 1.05),
        ("...\n<think>", "so</think>\n<answer>1</answer>", 0.1),
        ("...\n<think>", "so</think>", 0.01),
        ("...\n<think>", "", 0),
        ([{"role": "user", "content": "..."}], [{"role": "assistant", "content": f"<think>so</think>\n{RIGHT}"}], 1.1),
    ],
)
def test_reward(prompt, completion, reward):
    assert countdown([prompt], [completion], numbers=[[1, 2, 3]], target=[9], prompt=["a column"]) == pytest.approx(
        [reward], abs=1e-12
    )


# ---------------------------------------------------------------- rows


def reachable(numbers: list[Fraction]) -> set[Fraction]:
    """Values of all expressions that use every number once, by trying all."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        for value in [a + b, a - b, a * b] + ([a / b] if b else []):
            found |= reachable([*rest, value])
    return found


@pytest.mark.parametrize("numbers", [2, 3, 4])
def test_every_row_can_be_solved(numbers):
    for row in rows(12, numbers=numbers, seed=numbers):
        assert len(row["numbers"]) == numbers
        assert Fraction(row["target"]) in reachable([Fraction(n) for n in row["numbers"]])


@pytest.mark.parametrize(
    "options",
    [{}, {"numbers": 6, "largest": 9, "operators": "*+"}, {"numbers": 3, "largest": 20, "largest_target": 30}],
)
def test_the_answer_given_solves_the_row(options):
    task = Countdown(task="countdown", rows=200, **options)
    made = rows(200, **options)
    assert len({(*sorted(r["numbers"]), r["target"]) for r in made}) == 200
    for row in made:
        value, used = evaluate(row["answer"])
        assert (value, sorted(used)) == (row["target"], sorted(row["numbers"]))
        assert 1 <= min(used) <= max(used) <= task.largest
        assert 1 <= row["target"] <= task.largest_target
        assert {c for c in row["answer"] if c in "+-*/"} <= set(task.operators)
        assert row["prompt"].endswith("\n<think>")
        assert str(row["target"]) in row["prompt"]
        assert ", ".join(map(str, row["numbers"])) in row["prompt"]
        completion = f"</think>\n<answer> {row['answer']} </answer>"
        assert countdown([row["prompt"]], [completion], [row["numbers"]], [row["target"]]) == pytest.approx([1.1])


def problems(made: list[dict]) -> set[tuple]:
    return {(*sorted(row["numbers"]), row["target"]) for row in made}


def test_all_problems_of_a_small_space_and_no_more():
    small = {"numbers": 2, "largest": 5, "largest_target": 25}
    expected = {
        (a, b, int(value))
        for a, b in itertools.combinations_with_replacement(range(1, 6), 2)
        for value in reachable([Fraction(a), Fraction(b)])
        if value.denominator == 1 and 1 <= value <= 25
    }
    assert problems(rows(len(expected), split="all", **small)) == expected
    with pytest.raises(
        UserError, match=rf"^data\.train\.rows: .* only {len(expected)}; write rows: {len(expected)}, or options"
    ):
        rows(len(expected) + 1, split="all", **small)


def test_splits_share_no_problem_whatever_the_seeds():
    train = problems(rows(300, numbers=2, largest=30))
    held = problems(rows(60, "data.validation", numbers=2, largest=30, seed=7))
    assert not train & held
    assert problems(rows(60, numbers=2, largest=30, split="all", seed=7)) & train


def test_rows_follow_from_the_seed():
    assert rows(30, seed=1) == rows(30, seed=1)
    assert rows(30, seed=1) == rows(50, seed=1)[:30]
    assert not problems(rows(30, seed=1)) & problems(rows(30, seed=2))


def test_targets_that_are_hardly_ever_met_end_in_a_message():
    """Six numbers of up to 9999 that add up to at most 6 are all 1: one problem in 10^24."""
    with pytest.raises(UserError, match=r"^data\.train\.rows: 5 rows .* gave only 0 in the split 'train'"):
        rows(5, numbers=6, largest=9999, largest_target=6, operators="+")
