"""Exact match, multiple choice and conciseness against hand-written tables."""

import pytest

from hybrid_opt.errors import UserError
from hybrid_opt.tasks.conciseness import PAIRS, conciseness
from hybrid_opt.tasks.exact_match import exact_match
from hybrid_opt.tasks.multiple_choice import MOST_CHARACTERS, multiple_choice


def one(scorer, completion, reference, **options):
    return scorer(["?"], [completion], **options, answer=[reference])[0]


@pytest.mark.parametrize(
    ("completion", "reference", "none", "strip", "text"),
    [
        ("Oslo", "Oslo", 1, 1, 1),
        (" Oslo\n", "Oslo", 0, 1, 1),
        ("Oslo", " Oslo ", 0, 1, 1),
        ("oslo.", "Oslo", 0, 0, 1),
        ("New  \n York!", "new york", 0, 0, 1),
        ("Oslo..", "Oslo", 0, 0, 0),
        ("Oslo, Norway", "Oslo", 0, 0, 0),
        ("STRASSE", "stra\u00dfe", 0, 0, 1),
        ("cafe\u0301", "caf\u00e9", 0, 0, 1),
        ("", "", 1, 1, 1),
        ("", "Oslo", 0, 0, 0),
        (".", "", 0, 0, 1),
        ("7", 7, 1, 1, 1),
        ("7.0", 7, 0, 0, 0),
        ("\u0667", "7", 0, 0, 0),
        ("\uff17", "7", 0, 0, 0),
        ("\u0667", "\u0667", 1, 1, 1),
        ("7\u200b", "7", 0, 0, 0),
        ("Oslo", ["Bergen", "Oslo"], 1, 1, 1),
        ("Bergen Oslo", ["Bergen", "Oslo"], 0, 0, 0),
        ("None", None, None, None, None),
    ],
)
def test_exact_match(completion, reference, none, strip, text):
    assert one(exact_match, completion, reference, normalize="none") == none
    assert one(exact_match, completion, reference) == strip
    assert one(exact_match, completion, reference, normalize="text") == text


@pytest.mark.parametrize(
    ("pattern", "completion", "reward"),
    [
        (r"#### (\S+)", "so 3 + 4 = 7\n#### 7", 1),
        (r"#### (\S+)", "7", 0),
        (r"#### (\S+)", "#### 8\n#### 7", 0),  # the first match counts
        (r"(?s).*#### (\S+)", "#### 8\n#### 7", 1),
        (r"is (\d+)", "it is \u0667", 0),  # \d takes any script's digits, and the comparison does not
        (r"(8)|7", "7", 0),  # the group took no part
        (r"(\d)(\d)", "72", 1),
    ],
)
def test_a_pattern_finds_the_answer(pattern, completion, reward):
    assert one(exact_match, completion, "7", pattern=pattern) == reward


CHOSEN_B = [
    "B", " B\n", "(B)", "[B]", "B.", "B:", "B)", "**B**", "**B.**", "B) Paris", "B. Paris", "B: Paris", "B\nbecause it is", "(B) Paris",
    "Answer: B", "answer: b is wrong, B)", "ANSWER: B", "Answer: (B)", "Answer:\nB", "**Answer:** B", "Answer: **B**", "The answer is B",
    "the answer is B because A is too small", "The answer is (B).", "The answer is: B", "The correct option is B", "My choice: B",
    "Not A) but: the answer is B", "A) no\nB) yes\nAnswer: B", "The answer is B. I repeat: the answer is B.", "Answer=B",
    "Option A is wrong, so the answer is B",
]  # fmt: skip
CHOSEN_NOTHING = [
    "", "E", "b", "Paris", "AB", "A dog", "B Paris", "A or B", "A and B", "A) B)", "(A) no, (B) yes", "A\nB\nC\nD", "B\nA",
    "Answer: A or B", "Answer: B, C", "Answer: A/B", "Answer: (A) and (B)", "The answer is A. No, the answer is B.", "The answer is not A",
    "The answer is Brussels", "answer", "Answer:", "\u0412", "\uff22", "\u200bBx", "Answer: E",
]  # fmt: skip


@pytest.mark.parametrize("completion", CHOSEN_B)
def test_a_choice(completion):
    assert [one(multiple_choice, completion, right) for right in ("A", "B", "C", "D", 1, 0)] == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("completion", CHOSEN_NOTHING)
def test_no_choice(completion):
    assert [one(multiple_choice, completion, right) for right in "ABCD"] == [0, 0, 0, 0]


def test_labels_of_ones_own():
    labels = ("yes", "yes, but", "c++", "1")
    for completion, right in {
        "yes": 0,
        "(yes, but)": 1,
        "Answer: c++": 2,
        "1.": 3,
        "the answer is yes, but": 1,
    }.items():
        assert one(multiple_choice, completion, right, choices=labels) == 1, completion
    assert one(multiple_choice, "yesterday", 0, choices=labels) == 0


def test_of_a_long_completion_the_end_counts():
    assert one(multiple_choice, "A) " + "." * MOST_CHARACTERS + "B)", "B") == 1


@pytest.mark.parametrize("right", ["E", "", 4, -1, True, 1.0])
def test_a_right_label_that_is_no_choice(right):
    with pytest.raises(UserError, match=r"column 'answer' holds .*, which is none of the choices A, B, C, D"):
        one(multiple_choice, "A", right)


def test_no_right_label_no_reward():
    assert multiple_choice(["?", "?"], ["A", "A"], answer=[None, "A"]) == [None, 1]


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [("", "", 0), ("Oslo", "Oslo", 0), ("Rome", "Oslo", 0), ("", "Oslo", -4), (" Oslo", "Oslo", -1), ("x" * 10**6, "8", -999_999),
     ("\U0001f600", "8", 0), ("e\u0301", "e", -1), ("12", 7, -1), ("12", None, None)],
)  # fmt: skip
def test_conciseness(completion, reference, reward):
    assert one(conciseness, completion, reference) == reward


def test_conciseness_questions_are_different_and_answers_short():
    assert len({question for question, _ in PAIRS}) == len(PAIRS)
    assert all(0 < len(answer) <= 15 for _, answer in PAIRS)
