"""Tasks of reasoning-gym: which are offered, their rows, and their scorers on adversarial answers."""

import builtins
import json
import subprocess
import sys
import time
from importlib import util

import pytest

from hybrid_opt.config.tasks import ReasoningGym
from hybrid_opt.errors import UserError
from hybrid_opt.tasks import reasoning_gym as module
from hybrid_opt.tasks.reasoning_gym import MOST_CHARACTERS, reasoning_gym, task_class
from hybrid_opt.tasks.refused import LISTED, evaluating_calls, refused
from hybrid_opt.tasks.rows import columns_of, rows_of
from tests.conftest import ROOT
from tests.tasks.adversarial import ADVERSARIAL

factory = pytest.importorskip("reasoning_gym.factory")

EVALUATE = {
    "binary_matrix": {"eval"},
    "bitwise_arithmetic": {"eval"},
    "countdown": {"parse_expr"},
    "intermediate_integration": {"parse_expr"},
    "n_queens": {"eval"},
    "number_sorting": {"eval"},
    "polynomial_multiplication": {"parse_expr"},
    "puzzle24": {"parse_expr"},
    "simple_integration": {"parse_expr"},
    "spiral_matrix": {"eval"},
    "string_insertion": {"eval"},
}
"""Tasks of version 0.1.25 whose scorers work out a text by Python's or sympy's evaluator, as their source shows."""
OFFERED = sorted(set(factory.DATASETS) - set(EVALUATE) - set(LISTED))
COSTLY = {"knight_swap", "futoshiki"}  # half a second and more for a row
SPITEFUL = {
    "R99999999": None, "A+99999999": None, "1e99999999": None, "a,": 5000, "1 ": 5000, "1\n": 5000, "1\u00d7": 4000, "¬": 5000, "P→": 3000, "j": None,
    "[[1,2],[3]]": None, "{}": None, "null": None, '{"a":': 9000, "a=1,b=2": None, "up down ": 1000, "Move disk 1 from Peg 1 to Peg 2\n": 300,
}  # fmt: skip


def task(name: str, rows: int = 3, **options) -> ReasoningGym:
    return ReasoningGym(task="reasoning_gym", name=name, rows=rows, **options)


def judge(row: dict, *completions: object) -> list[float]:
    columns = {name: [value] * len(completions) for name, value in row.items()}
    return reasoning_gym(["?"] * len(completions), list(completions), **columns)


def test_the_scan_finds_what_the_sources_show():
    found = {name: calls for name, (dataset, _) in factory.DATASETS.items() if (calls := evaluating_calls(dataset))}
    assert found == EVALUATE


def plain(text: str) -> str:
    return eval(text)


class Judges:
    """Scorers as a later version might have them; each but the last two leads to an evaluator."""

    class Direct:
        def score_answer(self, answer, entry):
            return eval(answer)

    class Method:
        def score_answer(self, answer, entry):
            return self._parse(answer)

        @staticmethod
        def _parse(answer):
            return [eval(part) for part in answer]

    class Function:
        def score_answer(self, answer, entry):
            return (lambda text: plain(text))(answer)

    class ThroughModule:
        def score_answer(self, answer, entry):
            return builtins.eval(answer)

    class Own:
        def score_answer(self, answer, entry):
            return parse_expr(answer)

    class Plain:
        def score_answer(self, answer, entry):
            return float(answer == entry["answer"])


def parse_expr(text: str) -> str:
    return text.upper()


def test_the_scan_follows_methods_functions_and_modules():
    found = {name: evaluating_calls(judge) for name, judge in vars(Judges).items() if isinstance(judge, type)}
    expected = {name: {"eval"} for name in ("Direct", "Method", "Function", "ThroughModule")}
    assert found == {**expected, "Own": set(), "Plain": set()}
    assert refused("new", Judges.Method) == "its scorer calls eval, and text that a model wrote must not be evaluated"


def test_what_is_listed_exists():
    assert set(LISTED) <= set(factory.DATASETS)


@pytest.mark.parametrize("name", ["n_queens", "countdown", "codeio", "rubiks_cube", "composite"])
def test_refused_in_rows_columns_and_scorer(name):
    message = f"reasoning-gym's task '{name}' is not offered: it"
    for use in (rows_of, columns_of):
        with pytest.raises(UserError, match=f"^data.train: {message}"):
            use(task(name), "data.train")
    with pytest.raises(UserError, match=message):
        judge({"question": "?", "answer": "1", "entry": json.dumps({"name": name, "options": {}, "metadata": {}})}, "1")


def test_rows_and_their_scores():
    made = rows_of(task("leg_counting", 20, options={"max_animals": 4}), "data.train")
    assert len({row["question"] for row in made}) == 20
    assert all(tuple(row) == columns_of(task("leg_counting"), "data.train") for row in made)
    assert all(json.loads(row["entry"])["options"] == {"max_animals": 4} for row in made)
    for row in made:
        right = row["answer"]
        texts = [right, f" {right}\n", f"so <answer> {right} </answer>.", f"<answer>0</answer><answer>{right}</answer>"]
        assert judge(row, *texts, [{"role": "assistant", "content": right}]) == [1] * 5
        assert (
            judge(row, "", "none", f"<answer></answer>{right}", right + " " * 9 + "x" * MOST_CHARACTERS, None)
            == [0] * 5
        )


def test_rows_are_the_same_in_every_process():
    """ransom_note makes its rows in the order of a set, which differs from process to process."""
    code = (
        "import sys; from hybrid_opt.config.tasks import ReasoningGym; from hybrid_opt.tasks.rows import rows_of; "
        "print(rows_of(ReasoningGym(task='reasoning_gym', name='ransom_note', rows=4, seed=2), 'data.train'))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].strip() == str(rows_of(task("ransom_note", 4, seed=2), "data.train"))


def test_splits_and_seeds_share_no_question():
    """Entry i of the package depends on seed + i alone, so neighbouring seeds must not give neighbouring windows."""

    def questions(key: str, rows: int, seed: int) -> set[str]:
        return {
            row["question"]
            for row in rows_of(task("spell_backward", rows, seed=seed, options={"min_word_len": 8}), key)
        }

    train, more, held = (
        questions("data.train", 60, 0),
        questions("data.train", 60, 1),
        questions("data.validation", 40, 1),
    )
    assert not (train | more) & held
    assert len(train & more) < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "leg_countin"}, r"^data\.train: reasoning-gym has no task 'leg_countin' \(did you mean 'leg_counting'\?\)$"),
        ({"name": "leg_counting", "options": {"legs": 3}}, r"^data\.train\.options: leg_counting does not take \{'legs': 3\}: "),
        ({"name": "leg_counting", "options": {"max_animals": 1}}, r"^data\.train\.options: .*max_animals must be"),
        ({"name": "coin_flip"}, "1e999999999"),
        ({"name": "game_of_life_halting"}, "every answer"),
        ({"name": "count_bits", "rows": 50, "options": {"min_n": 1, "max_n": 3}},
         r"^data\.train\.rows: 50 rows .* gave only [0-3] in the split 'train'"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_explained(arguments, message):
    with pytest.raises(UserError, match=message):
        rows_of(task(**arguments), "data.train")


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "reasoning_gym" else util.find_spec(name))
    with pytest.raises(UserError, match=r"^data\.validation: .*pip install 'hybrid-opt\[tasks\]'"):
        columns_of(task("leg_counting"), "data.validation")


def test_every_offered_task_survives_and_judges_from_json():
    """Own answers score as much after a trip through JSON, and no answer takes long, raises, or scores beyond 1."""
    completions = [
        c[:20_000] if isinstance(c, str) else c for name, c in ADVERSARIAL.items() if "as an answer" not in name
    ]
    completions += [text * (times or 1) for text, times in SPITEFUL.items()]
    slow = {}
    for name in sorted(set(OFFERED) - COSTLY):
        assert refused(name, task_class(name)) is None
        dataset = factory.create_dataset(name, seed=1, size=2)
        made = dataset[0]
        entry = json.dumps({"name": name, "options": {}, "metadata": made["metadata"]})
        row = {"question": made["question"], "answer": made["answer"], "entry": entry}
        if made["answer"] is not None:
            expected = dataset.score_answer(made["answer"].strip(), made)
            assert judge(row, made["answer"]) == [expected], name
        rewards, slow[name] = [], 0
        for completion in completions:
            start = time.perf_counter()
            rewards += judge(row, completion)
            slow[name] = max(slow[name], time.perf_counter() - start)
        assert all(0 <= reward <= 1 for reward in rewards), name
        assert rewards.count(1) <= 2, name
    assert max(slow.values()) < 0.5, max(
        slow, key=slow.get
    )  # 0.1 and room for a busy machine; what is refused takes hours
