"""The sums example: rows, reward, supervised steps, options. GRPO itself is not run here: installing TRL takes minutes."""

import json
import math
import re
import subprocess
import sys
from itertools import islice

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_opt.config.run import Data
from hybrid_opt.errors import UserError
from hybrid_opt.objectives.causal_lm import CausalLmData, CausalLmObjective
from tests.conftest import GLASS, ROOT

SUMS = ROOT / "examples/sums"
sys.path.insert(0, str(SUMS))  # as for a script that lies there
import grpo  # noqa: E402
import sums  # noqa: E402
import warm_up  # noqa: E402

TOKENIZER = AutoTokenizer.from_pretrained(GLASS)


def glass():
    return AutoModelForCausalLM.from_pretrained(GLASS, dtype=torch.float32)


def options(*arguments: str):
    return grpo.options_parser().parse_args(arguments)


def test_rows_are_all_ordered_pairs_of_digits_once():
    train, test = sums.read_rows(sums.TRAIN), sums.read_rows(sums.TEST)
    assert (len(train), len(test)) == (60, 40)
    assert sorted(row["question"] for row in train + test) == [f"{a} + {b}" for a in range(10) for b in range(10)]
    for row in train + test:
        assert int(row["answer"]) == sum(int(digit) for digit in row["question"].split(" + "))


def test_prompt_and_completion_are_what_the_issue_of_a_run_file_says():
    row = next(row for row in sums.read_rows(sums.TRAIN) + sums.read_rows(sums.TEST) if row["question"] == "3 + 5")
    assert row["prompt"] + row["completion"] == "Q: 3 + 5\nA: 8\n"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (" 8\n", 1.0),
        (" 8", 1.0),
        ("8\nQ: 1 + 1", 1.0),
        (" 8 \n 9", 1.0),
        (" 18\n", 0.0),
        (" 8.\n", 0.0),
        (" 08\n", 0.0),
        (" 3 + 5 = 8\n", 0.0),
        ("\n8", 0.0),
        ("", 0.0),
    ],
)
def test_exact_match_is_strict_up_to_the_newline(completion, reward):
    assert sums.exact_match(["Q: 3 + 5\nA:"], [completion], answer=["8"], question=["3 + 5"]) == [reward]


def test_exact_match_refuses_columns_of_another_length():
    with pytest.raises(ValueError, match="zip"):
        sums.exact_match([""] * 2, ["8", "8"], answer=["8"])


def test_a_completion_ends_at_every_token_with_a_newline():
    stops = warm_up.stop_tokens(TOKENIZER)
    texts = {i: TOKENIZER.decode([i]) for i in range(len(TOKENIZER))}
    assert stops == sorted({TOKENIZER.eos_token_id} | {i for i, text in texts.items() if "\n" in text})
    assert TOKENIZER("\n", add_special_tokens=False).input_ids[-1] in stops


def test_supervised_loss_is_that_of_the_toolkit():
    """Rows of different lengths, so that a wrong mask or a mean over all tokens of the batch would show."""
    rows = [
        {"question": "3 + 5", "answer": "8"},
        {"question": "9 + 9 and then some more", "answer": "18 and so on"},
    ]
    rows = [{**row, "prompt": sums.PROMPT.format(**row), "completion": sums.COMPLETION.format(**row)} for row in rows]
    data = Data(train="unused", prompt=sums.PROMPT, completion=sums.COMPLETION, append_eos=False)
    ours = CausalLmData(data, TOKENIZER)
    model = glass().eval()
    expected = CausalLmObjective().losses(model, ours.collate(ours.encode(Dataset.from_list(rows)))).mean()
    assert warm_up.supervised_loss(model, warm_up.supervised_batch(rows, TOKENIZER)).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_batches_see_every_row_before_any_again():
    rows = list(range(6))
    batches = list(islice(warm_up.shuffled_batches(rows, 4, seed=3), 3))
    assert [len(batch) for batch in batches] == [4, 4, 4]
    seen = [row for batch in batches for row in batch]
    assert sorted(seen[:6]) == rows
    assert sorted(seen[6:]) == rows
    assert batches == list(islice(warm_up.shuffled_batches(rows, 4, seed=3), 3))
    assert batches != list(islice(warm_up.shuffled_batches(rows, 4, seed=4), 3))


def test_supervised_steps_are_kept_for_the_next_call(tmp_path):
    rows = sums.read_rows(sums.TRAIN)
    plan = warm_up.WarmUp(steps=3, batch_size=4, learning_rate=1e-3, seed=0)
    batch = warm_up.supervised_batch(rows, TOKENIZER)
    before = warm_up.supervised_loss(glass(), batch).item()
    first, taken = warm_up.warmed_up(glass(), TOKENIZER, rows, plan, tmp_path)
    assert warm_up.supervised_loss(first, batch).item() < 0.9 * before
    again, remembered = warm_up.warmed_up(glass(), TOKENIZER, rows, plan, tmp_path)
    assert remembered == taken
    assert taken.seconds > 0
    assert taken.peak_memory_bytes > 0
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    other, _ = warm_up.warmed_up(glass(), TOKENIZER, rows, warm_up.WarmUp(0, 4, 1e-3, 0), tmp_path)
    assert warm_up.supervised_loss(other, batch).item() == before


def test_greedy_exact_match_counts_the_rows_that_are_right():
    """What the model says itself is the answer of two of three rows."""
    model, stops = glass(), warm_up.stop_tokens(TOKENIZER)
    rows = [{"prompt": text} for text in ("The morning was", "I looked at the", "She said that the glass was")]
    for row in rows:
        ids = TOKENIZER(row["prompt"], return_tensors="pt")
        text = model.generate(**ids, do_sample=False, max_new_tokens=8, eos_token_id=stops)[0, ids.input_ids.shape[1] :]
        row["answer"] = TOKENIZER.decode(text, skip_special_tokens=True).split("\n")[0].strip()
    rows[1]["answer"] += "x"
    assert warm_up.greedy_exact_match(model, TOKENIZER, rows, stops) == 2 / 3


def test_options_of_which_no_run_can_come_are_refused(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="--overwrite"):
        grpo.check(options("--output", str(tmp_path)))
    grpo.check(options("--output", str(tmp_path), "--overwrite"))
    for wrong in (["--batch-size", "12", "--num-generations", "8"], ["--num-generations", "1"]):
        with pytest.raises(UserError, match="--num-generations"):
            grpo.check(options("--output", str(tmp_path / "new"), *wrong))
    with pytest.raises(UserError, match="61 prompts, and there are 60"):
        grpo.check(options("--output", str(tmp_path / "new"), "--batch-size", "122", "--num-generations", "2"))
    with pytest.raises(UserError, match="an alias"):
        grpo.main(["--output", str(tmp_path / "new"), "--model", "no/such", "--environment", str(tmp_path / "env")])
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--warm-up-steps", "-1"],
        ["--beta", "-1"],
        ["--loss-type", "x"],
        ["--lora-rank", "0"],
    ],
)
def test_numbers_that_mean_nothing_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        options(*wrong)
    assert end.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_an_environment_is_made_once_and_again_if_it_is_not_whole(tmp_path, monkeypatch):
    commands, failing = [], [0, 1]

    def run(command, **rest):
        commands.append([str(word) for word in command])
        (tmp_path / "env").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, failing.pop(0) if failing else 0)

    monkeypatch.setattr(grpo.subprocess, "run", run)
    with pytest.raises(UserError, match="could not be made"):
        grpo.installed(tmp_path / "env")
    python = grpo.installed(tmp_path / "env")
    assert len(commands) == 4
    assert {"torch", "trl==1.16.0", str(ROOT / "constraints.txt")} <= set(commands[3])
    assert commands[3][0] == str(python)
    assert grpo.installed(tmp_path / "env") == python
    assert len(commands) == 4


def test_the_script_starts_again_in_the_other_environment_with_the_models_folder(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(grpo, "installed", lambda environment: tmp_path / "python")
    monkeypatch.setattr(grpo.os, "execve", lambda *started_with: started.append(started_with))
    arguments = ["--model", str(GLASS), "--output", str(tmp_path / "out"), "--seed", "7"]
    grpo.main(arguments)
    ((python, command, environment),) = started
    assert python == tmp_path / "python"
    assert command == [str(python), grpo.__file__, *arguments, "--model", str(GLASS)]
    assert environment["PYTHONPATH"].split(grpo.os.pathsep)[0] == str(ROOT)


def test_help_needs_no_torch_and_names_every_default():
    command = [sys.executable, "-X", "importtime", str(SUMS / "grpo.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert not any(line.split("|")[-1].strip() in ("torch", "trl") for line in shown.stderr.splitlines())
    flat = " ".join(shown.stdout.split())
    for name, value in vars(options()).items():
        assert f"--{name.replace('_', '-')}" in flat
        assert value is None or f"(default: {value})" in flat


def test_the_readme_names_the_defaults_that_the_search_found():
    text = (SUMS / "README.md").read_text(encoding="utf-8")
    for name in ("learning_rate", "num_generations", "batch_size", "warm_up_learning_rate"):
        written = re.findall(rf"`--{name.replace('_', '-')} ([^`]+)`", text)
        assert [float(value) for value in written] == [getattr(options(), name)], name


def test_a_mistake_is_one_line(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"seconds": math.pi}))
    command = [sys.executable, str(SUMS / "grpo.py"), "--output", str(tmp_path)]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: --output: ")
    assert failed.stderr.count("\n") == 1
