"""`hybrid-opt evaluate` against what runs measure themselves, against sums by hand, and against lm-eval."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_opt.cli import main
from hybrid_opt.config import load_run
from hybrid_opt.display.progress import Silence
from hybrid_opt.errors import UserError
from hybrid_opt.models.loading import load_model
from hybrid_opt.studies.evaluate.measuring import Measured, evaluated, perplexity
from hybrid_opt.studies.evaluate.subject import BASE, EVALUATED, OWN, SECOND, subject
from hybrid_opt.studies.evaluate.table import verdict
from hybrid_opt.training.build import build
from tests.conftest import PROSE, ROOT, SPAM, interrupt_after, run_document

SCHEDULE = {
    "estimators": {"backprop": {"type": "backprop", "learning_rate": 1e-2}},
    "schedule": {"type": "single", "estimator": "backprop"},
}


def measured(*arguments, rows=None, **options) -> dict[tuple[str, str, str], Measured]:
    found = evaluated(subject(*arguments, **options), rows, None, lambda line: None)
    return {(m.set, m.model, m.measure): m for m in found}


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command: exit status, stdout, stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["hybrid-opt", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *(" ".join(text.split()) for text in capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """A finished run on spam, and its summary."""
    folder = tmp_path_factory.mktemp("evaluated")
    data = {"train": str(SPAM), "validation": 0.1, "prompt": "{subject}\nSpam or ham?", "completion": " {label}", "max_tokens": 48,
            "choices": [" spam", " ham"]}  # fmt: skip
    document = run_document(
        folder / "run",
        data=data,
        objective={"type": "choice"},
        training={"steps": 6, "batch_size": 8},
        schedule=SCHEDULE,
    )
    (folder / "run.yaml").write_text(json.dumps(document))
    build(load_run(folder / "run.yaml"), display=Silence()).train()
    return folder / "run"


def test_a_run_measures_the_same_of_itself(run_of):
    found, summary = measured(str(run_of)), json.loads((run_of / "summary.json").read_text())
    for label, when in ((BASE, "before"), (EVALUATED, "after")):
        for measure in ("loss", "accuracy"):
            assert found[OWN, label, measure].value == pytest.approx(summary[when][measure], abs=1e-6)
    gain = found[OWN, EVALUATED, "loss"]
    assert gain.difference == pytest.approx(summary["after"]["loss"] - summary["before"]["loss"], abs=1e-6)
    assert found[OWN, EVALUATED, "loss"].low < gain.value < gain.high
    assert gain.rows == 40


def test_plain_text_by_hand(run_of, tmp_path):
    """Perplexity is the exponential of the mean over tokens, the loss the mean over blocks; the difference is taken block by block."""
    found = measured(str(run_of), second=str(PROSE), rows=5)
    tokenizer = AutoTokenizer.from_pretrained(run_of / "model")
    ids = tokenizer(PROSE.read_text(), add_special_tokens=False)["input_ids"]
    own = load_run(run_of / "run.yaml")
    models = {
        BASE: load_model(own.model, None, own.training.seed),
        EVALUATED: AutoModelForCausalLM.from_pretrained(run_of / "model"),
    }
    blocks = [ids[i : i + 48] for i in range(0, len(ids), 48)]
    count = math.ceil((len(ids) + 1) / 48)  # the text ends with its own token
    chosen = [torch.tensor([blocks[i * count // 5]]) for i in range(5)]
    losses = {
        label: [model.eval()(block, labels=block).loss.item() for block in chosen] for label, model in models.items()
    }
    for label, values in losses.items():
        assert found[SECOND, label, "loss"].value == pytest.approx(np.mean(values), abs=1e-5)
        assert found[SECOND, label, "perplexity"].value == pytest.approx(math.exp(np.mean(values)), rel=1e-5)
    told = found[SECOND, EVALUATED, "loss"]
    apart = np.subtract(losses[EVALUATED], losses[BASE])
    assert told.difference == pytest.approx(apart.mean(), abs=1e-5)
    half = 2.7764 * apart.std(ddof=1) / 5**0.5  # Student's t with 4 degrees of freedom
    assert told.difference_high - told.difference_low == pytest.approx(2 * half, rel=1e-3)


def test_perplexity_of_rows_of_different_lengths():
    """Two rows of 1 and 3 tokens with losses 2 and 3 in all: (2 + 3) / 4; all rows alike: no width."""
    assert perplexity([2.0, 3.0], [1, 3])[0] == pytest.approx(math.exp(1.25))
    value, low, high = perplexity([2.0, 4.0, 6.0], [1, 2, 3])
    assert low == pytest.approx(value) == pytest.approx(high) == pytest.approx(math.exp(2))
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, (400, 50))
    nats = rng.gamma(tokens, 0.7)
    inside = [low < math.exp(0.7) < high for _, low, high in map(perplexity, nats.tolist(), tokens.tolist())]
    assert 0.9 < np.mean(inside) < 0.98  # of 95 %, by 400 experiments


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ((0.2, 0.1, 0.3), "the model is worse than the base: loss +0.20 ± 0.10"),
        ((-0.2, -0.3, -0.1), "better than the base"),
        ((0.1, -0.1, 0.3), "no change of the loss on the second set can be told from chance"),
    ],
)
def test_the_verdict_in_words(difference, words):
    assert words in verdict([Measured(SECOND, EVALUATED, "loss", 9, 1.0, 0.9, 1.1, *difference)])


def test_other_rows_and_models(run_of, tmp_path):
    other = tmp_path / "first.jsonl"
    other.write_text("".join(SPAM.read_text().splitlines(keepends=True)[:10]))
    by_run = measured(str(run_of), data=str(other), base="none")
    by_model = measured(str(run_of / "model"), run=run_of, data=str(other), base="none")
    assert by_run.keys() == by_model.keys() == {(OWN, EVALUATED, measure) for measure in ("loss", "accuracy")}
    assert by_run[OWN, EVALUATED, "loss"] == by_model[OWN, EVALUATED, "loss"]
    own = {"data": {"train": str(other), "prompt": "{subject}\nSpam or ham?", "completion": " {label}", "max_tokens": 48,
                    "choices": [" spam", " ham"]}, "objective": {"type": "choice"}}  # fmt: skip
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(own))
    by_file = measured(str(run_of / "model"), data=str(tmp_path / "rows.yaml"))
    assert by_file[OWN, EVALUATED, "loss"] == by_run[OWN, EVALUATED, "loss"]
    against_itself = measured(str(run_of / "model"), data=str(tmp_path / "rows.yaml"), base=str(run_of))
    assert against_itself[OWN, EVALUATED, "loss"].difference == 0
    beside = measured(str(run_of / "model"), run=run_of, data=str(other))  # the run file says what it started from
    assert beside[OWN, BASE, "loss"].value == measured(str(run_of), data=str(other))[OWN, BASE, "loss"].value


def test_a_reward(run_of, tmp_path):
    """Of what the model writes on its own: minus how far its length is from the reference's."""
    rows = [
        {"question": text, "answer": "x" * length} for text, length in (("one", 2), ("two and two", 5), ("three", 0))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {
        "data": {"train": str(tmp_path / "rows.jsonl"), "prompt": "{question}", "max_tokens": 40},
        "objective": {
            "type": "reward",
            "rewards": [{"function": "conciseness", "arguments": {"column": "answer"}}],
            "generation": {"max_new_tokens": 3},
        },
    }
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(own))
    found = measured(str(run_of / "model"), data=str(tmp_path / "rows.yaml"))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(run_of / "model"),
        AutoTokenizer.from_pretrained(run_of / "model"),
    )
    rewards = []
    for row in rows:
        prompt = tokenizer(row["question"], return_tensors="pt")["input_ids"]
        written = model.generate(prompt, max_new_tokens=3, do_sample=False)[0, prompt.shape[1] :]
        rewards.append(-abs(len(tokenizer.decode(written, skip_special_tokens=True)) - len(row["answer"])))
    assert len(set(rewards)) > 1
    assert found[OWN, EVALUATED, "reward"].value == pytest.approx(np.mean(rewards))
    assert found[OWN, EVALUATED, "loss"].value == pytest.approx(-np.mean(rewards))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--data", "nothing.jsonl"], "error: --data: data.train: nothing.jsonl: no such file"),
        (["RUN", "--forgetting", str(SPAM), "--text", "bodi"], "error: --forgetting: data.text: there is no column 'bodi' (did you mean 'body'"),
        (["RUN", "--data", "nothing.yaml"], "nothing.yaml: no such file"),
        (["RUN/model"], "RUN/model is no run folder (it has no run.yaml), so nothing says what it is to be evaluated on; add --data"),
        (["RUN", "model.name=other"], "model.name=other has no effect on an evaluation, which reads data, objective, engine.device"),
        (["RUN", "--base", "no/such/folder"], "error: --base: "),
        (["RUN", "--forgetting", str(PROSE), "--max-tokens", "4096"], "error: --forgetting: data.max_tokens: an example has 4096 tokens"),
        (["RUN/model", "training.seed=3"], "is no run folder; add --run RUN.yaml"),
        (["RUN/run.yaml"], "is neither a run folder nor a model; give a run's output folder"),
        (["RUN", "data.validation=null"], "data.validation: the run has no held-out rows"),
        (["RUN", "--rows", "0"], "Invalid value for '--rows'"),
        (["RUN", "--json", "no/such/file.json"], "there is no folder"),
        (["RUN", "data.validaton=0.2"], "validaton"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(run_of, command, arguments, message):
    code, _, said = command(*(a.replace("RUN", str(run_of), 1) if a.startswith("RUN") else a for a in arguments))
    assert code == 2
    assert message.replace("RUN/model", f"{run_of}/model") in said


def test_a_run_that_has_no_model_yet(run_of, tmp_path):
    own = yaml.safe_load((run_of / "run.yaml").read_text())
    own["output"] = str(tmp_path / "own")
    own["training"]["checkpoint_every"] = 2
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    trainer = build(load_run(tmp_path / "own.yaml"), display=Silence())
    interrupt_after(trainer, step=3)
    trainer.train()
    with pytest.raises(
        UserError,
        match=r"it has no model/.* hybrid-opt replay \S+ --to-step 4 --output FOLDER, then hybrid-opt evaluate FOLDER --run",
    ):
        subject(str(tmp_path / "own"))
    shutil.rmtree(tmp_path / "own/checkpoints")
    with pytest.raises(UserError, match="it has no checkpoint either; let it go on"):
        subject(str(tmp_path / "own"))


def test_blocks_of_plain_text_have_the_length_that_is_asked_for(run_of):
    found = {
        size: measured(str(run_of), second=str(PROSE), base="none", max_tokens=size)[SECOND, EVALUATED, "loss"]
        for size in (24, 48)
    }
    assert found[24].rows == pytest.approx(2 * found[48].rows, abs=1)


@pytest.mark.parametrize(("factor", "words"), [(float("nan"), "loss is not finite on 40 of 40 rows"), (1e4, None)])
def test_a_model_that_has_diverged(run_of, tmp_path, factor, words):
    """It has no mean loss; where it has one, however large, the perplexity is a number."""
    model = AutoModelForCausalLM.from_pretrained(run_of / "model")
    model.get_output_embeddings().weight.data.mul_(factor)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(run_of / "model").save_pretrained(tmp_path / "model")
    if words:
        with pytest.raises(UserError, match=words):
            measured(str(tmp_path / "model"), run=run_of)
    else:
        found = measured(str(tmp_path / "model"), run=run_of, second=str(PROSE), rows=4)
        assert found[SECOND, EVALUATED, "perplexity"].value == pytest.approx(math.exp(700), rel=1e-6)


def test_code_is_not_run_unasked(run_of, tmp_path, command):
    own = {"data": {"train": str(SPAM), "prompt": "{subject}", "completion": " {label}"}, "objective": {"type": "function", "function": "evil:losses"}}  # fmt: skip
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(own))
    code, _, said = command(run_of, "--data", tmp_path / "rows.yaml")
    assert code == 2
    assert "evil:losses is code" in said


def test_the_table_and_the_file(run_of, tmp_path, command):
    code, shown, _ = command(run_of, "--rows", 8, "--json", tmp_path / "found.json")
    assert code == 0
    rows = json.loads((tmp_path / "found.json").read_text())
    assert [row["measure"] for row in rows] == ["loss", "accuracy"] * 2
    assert "(8)" in shown
    assert "difference" in shown


def test_lm_eval_agrees(run_of, tmp_path):
    """On the saved folder, by the example's task with rows of its own."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    rows = [json.loads(line) for line in SPAM.read_text().splitlines()[:30]]
    for row in rows:
        row["body"] = row["body"][:20]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = yaml.safe_load((ROOT / "examples/spam/lm_eval_spam.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "rows.jsonl")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/spam.yaml").write_text(yaml.safe_dump(task))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={run_of / 'model'},dtype=float32", tasks=["spam"], task_manager=manager, device="cpu", bootstrap_iters=0,
    )  # fmt: skip
    data = {"train": str(tmp_path / "rows.jsonl"), "prompt": "Subject: {subject}\n{body}\nSpam or ham?", "completion": " {label}",
            "choices": [" spam", " ham"], "max_tokens": 400}  # fmt: skip
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump({"data": data, "objective": {"type": "choice"}}))
    ours = measured(str(run_of / "model"), data=str(tmp_path / "rows.yaml"))
    assert theirs["results"]["spam"]["acc,none"] == pytest.approx(ours[OWN, EVALUATED, "accuracy"].value)
