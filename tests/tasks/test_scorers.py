"""All scorers: adversarial completions, options, columns; and the promise that nothing is executed."""

import ast
import json
import math
import pickle
import subprocess
import sys
import time

import pytest

from hybrid_opt.errors import UserError
from hybrid_opt.tasks.completions import last_answer, text_of
from hybrid_opt.tasks.scorers import SCORERS, needed_columns, scorer
from tests.conftest import ROOT
from tests.tasks.adversarial import ADVERSARIAL

ENTRY = {"name": "leg_counting", "options": {}, "metadata": {}}
CASES = {
    "exact_match": ({}, {"answer": "3"}),
    "exact_match, text": ({"normalize": "text"}, {"answer": "3"}),
    "exact_match, pattern": ({"pattern": r"<answer>(\d+)</answer>"}, {"answer": "3"}),
    "multiple_choice": ({}, {"answer": "B"}),
    "countdown": ({}, {"numbers": [1, 2], "target": 3}),
    "arithmetic": ({}, {"answer": "3"}),
    "arithmetic, number": ({"form": "number"}, {"answer": "3"}),
    "conciseness": ({}, {"answer": "3"}),
    "reasoning_gym": ({}, {"question": "?", "answer": "3", "entry": json.dumps(ENTRY)}),
}


def judge(case: str, completions: list) -> list:
    arguments, row = CASES[case]
    columns = {name: [value] * len(completions) for name, value in row.items()}
    return scorer(case.partition(",")[0], arguments)(
        prompts=["?\n<think>"] * len(completions), completions=completions, **columns
    )


@pytest.mark.parametrize("case", CASES)
def test_a_finite_reward_within_a_tenth_of_a_second(case, tmp_path, monkeypatch):
    if case == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    judge(case, ["warm up"])
    for name, completion in ADVERSARIAL.items():
        seconds = []
        for _ in range(3):  # the machine may be busy; the quickest of three is the scorer's own time
            start = time.perf_counter()
            (reward,) = judge(case, [completion])
            seconds.append(time.perf_counter() - start)
            if seconds[-1] < 0.1:
                break
        assert min(seconds) < 0.1, (name, seconds)
        assert isinstance(reward, float), name
        assert math.isfinite(reward), name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", [case for case in CASES if "exact_match" in case or "arithmetic" in case])
def test_nothing_adversarial_is_right(case):
    """The reference is 3; the only texts that say so are those that hold it in plain digits."""
    right = {name for name, completion in ADVERSARIAL.items() if judge(case, [completion]) == [1]}
    expected = {
        "zero width",
        "zero width, as an answer",
        "null character",
        "null character, as an answer",
        "lone surrogate",
    }
    assert right <= (expected | {"lone surrogate, as an answer"} if case == "arithmetic" else set())


def test_an_answer_for_each_completion_in_its_order():
    assert judge("exact_match", ["3", "4", " 3\n"]) == [1, 0, 1]
    with pytest.raises(ValueError, match="longer"):
        scorer("exact_match", {})(prompts=["?"], completions=["3"], answer=["3", "4"])


def test_options_are_bound_and_survive_pickling():
    function = pickle.loads(pickle.dumps(scorer("exact_match", {"column": "right", "normalize": "text"})))
    assert function(prompts=["?"], completions=["YES."], right=["yes"], answer=["no"]) == [1]


def test_a_column_named_like_an_option_changes_nothing():
    function = scorer("multiple_choice", {"choices": ["x", "y"]})
    assert function(prompts=["?"], completions=["(y)"], answer=["y"], choices=[["A", "B"]]) == [1]
    with pytest.raises(UserError, match=r"rewards\.2\.arguments\.column: 'choices' is also the name of an option"):
        scorer("multiple_choice", {"column": "choices"}, "objective.rewards.2")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "exact_mach",
            {},
            r"^k\.function: there is no built-in scorer 'exact_mach' \(did you mean 'exact_match'\?\); .*module:f",
        ),
        (
            "exact_match",
            {"colum": "a"},
            r"^k\.arguments\.colum: .* \(did you mean 'column'\?\); options: column, pattern, norm",
        ),
        ("exact_match", {"prompts": []}, r"^k\.arguments\.prompts: exact_match has no such option"),
        ("countdown", {"numbers": [1]}, r"^k\.arguments\.numbers: countdown has no such option; options: none"),
        ("exact_match", {"normalize": "all"}, r"^k\.arguments\.normalize: .*'none', 'strip' or 'text'.*, got 'all'"),
        ("exact_match", {"pattern": "("}, r"^k\.arguments\.pattern: '\(' is not a regular expression"),
        ("exact_match", {"pattern": "a"}, r"^k\.arguments\.pattern: 'a' has no group"),
        ("exact_match", {"column": 3}, r"^k\.arguments\.column: Input should be a valid string"),
        ("multiple_choice", {"choices": ["A", "A"]}, r"^k\.arguments\.choices: .*at least two different labels"),
        ("multiple_choice", {"choices": ["A", ""]}, r"^k\.arguments\.choices: "),
    ],
)
def test_what_does_not_fit_is_named(name, arguments, message):
    with pytest.raises(UserError, match=message):
        scorer(name, arguments, "k")
    with pytest.raises(UserError, match=message):
        needed_columns(name, arguments, "k")


@pytest.mark.parametrize(
    ("name", "arguments", "columns"),
    [
        ("exact_match", {}, ["answer"]),
        ("exact_match", {"column": "label"}, ["label"]),
        ("countdown", {}, ["numbers", "target"]),
        ("arithmetic", {"form": "number"}, ["answer"]),
        ("reasoning_gym", {}, ["question", "answer", "entry"]),
    ],
)
def test_columns_that_are_read(name, arguments, columns):
    assert needed_columns(name, arguments) == columns


def test_a_missing_column_is_named():
    with pytest.raises(UserError, match=r"no column 'anwser' \(did you mean 'answer'\?\) .* one of answer, id"):
        scorer("exact_match", {"column": "anwser"})(prompts=["?"], completions=[""], answer=[""], id=[1])


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("a", "a"),
        (None, ""),
        (3, ""),
        ([], ""),
        ([{"role": "assistant", "content": "a"}], "a"),
        ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], "ab"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}], "a"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], ""),
    ],
)
def test_texts_of_completions(completion, text):
    assert text_of(completion) == text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("<answer>1", None),
        ("</answer>1<answer>", None),
        ("<answer></answer>", ""),
        ("<answer>1</answer><answer> 2 </answer>", " 2 "),
        ("<answer>1</answer><answer>2", "1"),
        ("<answer>a<answer>b</answer></answer>", "a<answer>b"),
        ("<answer>a\nb</answer>", "a\nb"),
        ("<ANSWER>1</ANSWER>", None),
    ],
)
def test_the_last_answer(text, answer):
    assert last_answer(text) == answer


def test_the_package_calls_nothing_that_evaluates_text():
    evaluating = {"eval", "exec", "compile", "literal_eval", "sympify", "parse_expr", "__import__", "lambdify"}
    found = []
    for path in sorted((ROOT / "hybrid_opt").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name) and node.id in evaluating:
                found.append(f"{path.name}: {node.id}")
            if isinstance(node, ast.Attribute) and node.attr in evaluating:
                # nn.Module.eval() takes no text, and re.compile makes no code
                of_regex = node.attr == "compile" and isinstance(node.value, ast.Name) and node.value.id == "re"
                found += [] if node.attr == "eval" or of_regex else [f"{path.name}: .{node.attr}"]
    assert found == []


def test_scorers_need_no_torch():
    code = "import sys, hybrid_opt.tasks.scorers, hybrid_opt.tasks.rows; print('torch' in sys.modules, 'sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_every_scorer_has_its_cases():
    assert set(SCORERS) == {case.partition(",")[0] for case in CASES}
