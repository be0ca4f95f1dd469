"""Runs as a whole, on the small pretrained model: what they leave behind, and going on after an interruption."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_opt import LocalEngine, Trainer, UserError, build, load_run
from hybrid_opt.display.progress import Silence
from hybrid_opt.recovery.checkpoint import checkpoints
from hybrid_opt.training.evaluation import evaluate
from tests.conftest import GLASS, PROSE, ROOT, die_before, interrupt_after, tiny_model, token_batch, token_losses

LM = {
    "data": {"train": str(PROSE), "validation": 0.05, "text": "text", "max_tokens": 64},
    "objective": {"type": "causal_lm"},
}
ES = {"type": "es", "population_size": 4, "sigma": 0.01, "learning_rate": 1e-4, "fitness_shaping": "none"}
ADAMW = {"type": "backprop", "learning_rate": 1e-3}
ALTERNATE = {
    "estimators": {"es": ES, "backprop": ADAMW},
    "schedule": {"type": "alternate", "pattern": {"es": 1, "backprop": 2}},
}


def train(path, *overrides, **options):
    return build(load_run(path, overrides), display=Silence(), **options).train()


def final_weights(folder):
    return load_file(folder / "model/model.safetensors")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_everything_that_is_promised(write_run, tmp_path):
    training = {"steps": 6, "batch_size": 4, "evaluate_every": 2, "probe_rows": 8}
    summary = train(write_run(**LM, training=training, schedule=ALTERNATE))
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "curves.png", "evaluations.jsonl", "ledger.jsonl", "machine.json", "metrics.jsonl", "model", "process.json", "run.yaml",
        "summary.json",
    ]  # fmt: skip
    metrics, evaluations = lines(out / "metrics.jsonl"), lines(out / "evaluations.jsonl")
    assert [row["estimators"] for row in metrics] == [["es"], ["backprop"], ["backprop"]] * 2
    assert [row["step"] for row in metrics] == list(range(6))
    assert [(row["forwards"], row["backwards"]) for row in metrics[:2]] == [(4, 0), (1, 1)]
    assert [row["tokens"] for row in metrics[:2]] == [4 * 4 * 64, 4 * 64]
    assert (metrics[0]["loss_spread"] > 0, metrics[1]["loss_spread"]) == (True, None)
    assert all(row["seconds"] > 0 and row["peak_memory_bytes"] > 1e8 for row in metrics)
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6]

    written = json.loads((out / "summary.json").read_text())
    assert written == summary.as_dict()
    assert written["before"]["loss"] == evaluations[0]["loss"]
    assert written["after"]["loss"] == evaluations[-1]["loss"] < written["before"]["loss"] - 0.2
    assert {k: (v["steps"], v["forwards"], v["backwards"]) for k, v in written["estimators"].items()} == {
        "es": (2, 8, 0), "backprop": (4, 4, 4),
    }  # fmt: skip
    assert sum(share["seconds"] for share in written["estimators"].values()) == pytest.approx(written["seconds"])
    # Every probe is taken at the same rows, so what the turns contributed adds up to the whole fall.
    assert written["estimators"]["backprop"]["loss_decrease"] > 0.1
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_saved_model_is_the_trained_one_and_transformers_loads_it(write_run, tmp_path):
    path = write_run(**LM, training={"steps": 2, "batch_size": 4, "probe_rows": 0}, schedule=ALTERNATE)
    trainer = build(load_run(path), display=Silence())
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/model")
    ids = tokenizer("It is a truth", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**ids).logits, trainer.optimizer.engine.model.eval()(**ids).logits)


def test_contributions_add_up_to_the_fall_of_the_probe_loss(write_run):
    training = {"steps": 6, "batch_size": 4, "probe_rows": 8}
    trainer = build(load_run(write_run(**LM, training=training, schedule=ALTERNATE)), display=Silence())
    before = trainer.attribution.probe()
    summary = trainer.train()
    fall = before - trainer.attribution.probe()
    credited = sum(share.loss_decrease for share in summary.estimators.values())
    assert credited == pytest.approx(fall, abs=1e-6)


def test_what_several_do_together_stays_shared(write_run):
    blend = {**ALTERNATE, "schedule": {"type": "blend", "weights": {"es": 0.1, "backprop": 1.0}}}
    summary = train(write_run(**LM, training={"steps": 2, "batch_size": 4, "probe_rows": 8}, schedule=blend))
    assert list(summary.shared_loss_decrease) == ["es+backprop"]
    assert {share.loss_decrease for share in summary.estimators.values()} == {None}


def test_two_runs_of_one_file_are_identical(write_run, tmp_path):
    path = write_run(**LM, training={"steps": 4, "batch_size": 4, "probe_rows": 0}, schedule=ALTERNATE)
    train(path, f"output={tmp_path / 'a'}")
    train(path, f"output={tmp_path / 'b'}")
    one, two = final_weights(tmp_path / "a"), final_weights(tmp_path / "b")
    assert all(torch.equal(one[name], two[name]) for name in one)
    keys = ("step", "loss", "losses", "loss_spread", "tokens", "learning_rates")
    a, b = ([{k: row[k] for k in keys} for row in lines(tmp_path / n / "metrics.jsonl")] for n in "ab")
    assert a == b


PHASES = {
    "type": "phases",
    "phases": [
        {"tokens": 1500, "schedule": {"type": "single", "estimator": "es"}},
        {"schedule": {"type": "alternate", "pattern": {"backprop": 1, "es": 1}}},
    ],
}


@pytest.mark.parametrize("kind", [ALTERNATE["schedule"], PHASES], ids=["alternate", "phases"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interrupted_and_resumed_is_uninterrupted_bitwise(write_run, tmp_path, kind, dtype, monkeypatch):
    estimators = {
        "es": {**ES, "update": {"type": "adam"}, "learning_rate": 1e-5},
        "backprop": {**ADAMW, "learning_rate_schedule": "linear"},
    }
    training = {"steps": 7, "batch_size": 2, "evaluate_every": 2, "probe_rows": 2, "evaluation_rows": 4}
    data = {**LM["data"], "validation": 0.01}
    model = {"name": str(ROOT / "tests/data/glass_en"), "dtype": dtype}
    path = write_run(
        **LM | {"data": data}, model=model, training=training, schedule={"estimators": estimators, "schedule": kind}
    )
    train(path, f"output={tmp_path / 'whole'}")

    interrupted = build(load_run(path), display=Silence())
    interrupt_after(interrupted, step=3)
    summary = interrupted.train()
    assert (summary.finished, summary.steps) == (False, 4)
    assert not (tmp_path / "out/model").exists()

    finished = train(path, resume=True)
    assert finished.finished
    one, two = final_weights(tmp_path / "whole"), final_weights(tmp_path / "out")
    assert all(torch.equal(one[name], two[name]) for name in one)
    rows = [[(r["step"], r["loss"]) for r in lines(tmp_path / n / "metrics.jsonl")] for n in ("whole", "out")]
    assert rows[0] == rows[1]
    rows = [[(r["step"], r["loss"]) for r in lines(tmp_path / n / "evaluations.jsonl")] for n in ("whole", "out")]
    assert rows[0] == rows[1]
    shares = [json.loads((tmp_path / n / "summary.json").read_text())["estimators"] for n in ("whole", "out")]
    assert shares[0]["es"]["loss_decrease"] == shares[1]["es"]["loss_decrease"]
    assert not (tmp_path / "out/checkpoints").exists()


def test_steps_after_the_last_checkpoint_are_taken_again(write_run, tmp_path):
    """A process that dies at once leaves the checkpoint and more lines of metrics than it covers."""
    training = {"steps": 6, "batch_size": 4, "probe_rows": 0, "checkpoint_every": 2}
    path = write_run(**LM, training=training, schedule=ALTERNATE)
    dying = build(load_run(path), display=Silence())
    die_before(dying, 5)
    assert checkpoints(tmp_path / "out/checkpoints")[0].name == "step-00000004"
    assert len(lines(tmp_path / "out/metrics.jsonl")) == 5
    train(path, resume=True)
    train(path, f"output={tmp_path / 'whole'}")
    one, two = final_weights(tmp_path / "whole"), final_weights(tmp_path / "out")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [row["step"] for row in lines(tmp_path / "out/metrics.jsonl")] == list(range(6))


def leave_checkpoint(path):
    """What a run leaves that is interrupted before its first step."""
    trainer = build(load_run(path), display=Silence())
    trainer.folder.prepare()
    trainer.folder.write_config(trainer.config)
    trainer._save()


def test_a_changed_run_file_is_not_resumed(write_run, tmp_path):
    path = write_run(
        **LM, training={"steps": 3, "batch_size": 4, "probe_rows": 0, "checkpoint_every": 2}, schedule=ALTERNATE
    )
    leave_checkpoint(path)
    with pytest.raises(UserError, match=r"schedule.estimators.es.sigma was 0.01 and is now 0.5; change it back"):
        train(path, "schedule.estimators.es.sigma=0.5", resume=True)
    # A longer run is the same run, and a lower rate is what a diverging one needs.
    longer = train(path, "training.steps=4", "schedule.estimators.es.learning_rate=1e-6", resume=True)
    assert longer.steps == 4


def test_the_length_of_a_run_with_a_falling_rate_is_not_changed(write_run, tmp_path):
    falling = {**ALTERNATE, "estimators": {"es": ES, "backprop": {**ADAMW, "learning_rate_schedule": "linear"}}}
    path = write_run(**LM, training={"steps": 3, "batch_size": 4, "probe_rows": 0}, schedule=falling)
    leave_checkpoint(path)
    with pytest.raises(UserError, match=r"training.steps was 3 and is now 9"):
        train(path, "training.steps=9", resume=True)


def test_ctrl_c_and_the_command_line(write_run, tmp_path):
    path = write_run(**LM, training={"steps": 100_000, "batch_size": 4, "probe_rows": 0}, schedule=ALTERNATE)
    command = [sys.executable, "-m", "hybrid_opt", "train", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out/metrics.jsonl"
    deadline = time.time() + 120
    while (not metrics.exists() or len(metrics.read_text().splitlines()) < 3) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "stopping after the current step" in output
    assert "go on with the same command and --resume" in output
    taken = len(lines(metrics))
    assert checkpoints(tmp_path / "out/checkpoints")[0].name == f"step-{taken:08d}"


def test_a_loss_that_blows_up_stops_and_weights_that_are_lost_are_not_saved(write_run, tmp_path):
    wild = {
        "estimators": {"backprop": {"type": "backprop", "optimizer": "SGD", "learning_rate": 1e30}},
        "schedule": {"type": "single", "estimator": "backprop"},
    }
    with pytest.raises(
        UserError,
        match=r"^step 1: after the update parameter model.embed_tokens.weight has values that are not finite; .*gradient_clipping$",
    ):
        train(write_run(**LM, training={"steps": 5, "batch_size": 4, "probe_rows": 0}, schedule=wild))
    assert not checkpoints(tmp_path / "out/checkpoints")


def test_lora_trains_adapters_alone_and_saves_a_whole_model(write_run, tmp_path):
    path = write_run(**LM, peft={"r": 4}, training={"steps": 3, "batch_size": 4, "probe_rows": 0}, schedule=ALTERNATE)
    trainer = build(load_run(path), display=Silence())
    assert all("lora" in name for name in trainer.optimizer.engine.parameters)
    summary = trainer.train()
    assert summary.after["loss"] < summary.before["loss"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    objective = trainer.optimizer.objective
    again = evaluate(LocalEngine(merged), objective, trainer.validation)
    assert again["loss"] == pytest.approx(summary.after["loss"], abs=1e-5)
    assert (tmp_path / "out/adapter/adapter_config.json").exists()


def test_adapters_by_backprop_over_weights_that_es_moves(write_run, tmp_path):
    path = write_run(
        **LM, peft={"r": 4, "trains_base": True}, training={"steps": 2, "batch_size": 4, "probe_rows": 0},
        schedule="lora_backprop_base_es",
    )  # fmt: skip
    trainer = build(load_run(path), display=Silence())
    policy = trainer.optimizer.policies[None]
    adapters, own = policy.names("backprop"), policy.names("es")
    assert {name for name in trainer.optimizer.engine.parameters if "lora_" in name} == set(adapters)
    assert {name.replace("base_model.model.", "").replace("base_layer.", "") for name in own} == {
        name for name, _ in AutoModelForCausalLM.from_pretrained(GLASS).named_parameters()
    }
    before = {name: p.detach().clone() for name, p in trainer.optimizer.engine.parameters.items()}
    summary = trainer.train()
    after = trainer.optimizer.engine.parameters
    assert all(not torch.equal(before[name], after[name]) for name in own)
    assert any(not torch.equal(before[name], after[name]) for name in adapters)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    again = evaluate(LocalEngine(merged), trainer.optimizer.objective, trainer.validation)
    assert again["loss"] == pytest.approx(summary.after["loss"], abs=1e-5)
    assert not (tmp_path / "out/adapter").exists()  # without the weights under it it would say something else


def test_every_recipe_that_moves_layers_suits_adapters_too(write_run):
    path = write_run(
        **LM, peft={"r": 2}, training={"steps": 1, "batch_size": 2, "probe_rows": 0}, schedule="backprop_then_es"
    )
    assert train(path).steps == 1


def test_a_model_from_random_weights_and_a_function_of_ones_own(write_run, tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "from tests.conftest import token_losses\n"
        "def per_example(model, batch):\n"
        "    return token_losses(model, {k: batch[k] for k in ('input_ids', 'position_ids')})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 1024}  # fmt: skip
    model = {"config": config, "tokenizer": str(ROOT / "tests/data/glass_en")}
    summary = train(
        write_run(**LM | {"objective": {"type": "function", "function": "my_losses:per_example"}}, model=model,
                  training={"steps": 8, "batch_size": 4, "probe_rows": 0}, schedule=ALTERNATE),
        "schedule.estimators.backprop.learning_rate=1e-2",
        allow_code=True,
    )  # fmt: skip
    assert summary.before["loss"] == pytest.approx(6.93, abs=0.05)  # log 1024: it knows nothing
    assert summary.after["loss"] < 6.9


def test_from_a_script_with_ones_own_model_and_batches(tmp_path):
    trainer = Trainer(
        tiny_model(), token_losses, [token_batch(4)], schedule=ALTERNATE, steps=9, validation=[token_batch(4)],
        output=tmp_path / "out", display=Silence(),
    )  # fmt: skip
    summary = trainer.train()
    assert summary.after["loss"] < summary.before["loss"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out/model").config.hidden_size == 32
    quiet = Trainer(
        torch.nn.Linear(2, 1),
        lambda m, b: m(b).pow(2).sum(1),
        [torch.ones(2, 2)],
        schedule=ALTERNATE,
        steps=2,
        display=Silence(),
    )
    assert quiet.train().steps == 2


def test_overwrite_removes_a_run_and_nothing_else(write_run, tmp_path):
    path = write_run(**LM, training={"steps": 1, "batch_size": 2, "probe_rows": 0}, schedule=ALTERNATE)
    train(path)
    train(path, overwrite=True)
    (tmp_path / "out/thesis.tex").write_text("ten years of work")
    with pytest.raises(UserError, match=r"holds other things than a run \(thesis.tex\)"):
        train(path, overwrite=True)
    assert (tmp_path / "out/thesis.tex").exists()
    assert (tmp_path / "out/summary.json").exists()


def test_the_resolved_file_repeats_the_run(write_run, tmp_path):
    train(
        write_run(**LM, training={"steps": 2, "batch_size": 2, "probe_rows": 0}), "schedule.estimators.es.sigma=0.002"
    )
    saved = tmp_path / "out/run.yaml"
    assert yaml.safe_load(saved.read_text())["schedule"]["estimators"]["es"]["sigma"] == 0.002
    train(saved, f"output={tmp_path / 'again'}")
    one, two = final_weights(tmp_path / "out"), final_weights(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("budget", "spent"),
    [
        ({"tokens": 1300}, [1024, 1280, 1536]),
        ({"forward_equivalents": 10}, [4, 7, 10]),
    ],
)
def test_a_budget_ends_the_run_with_the_step_that_reaches_it(write_run, tmp_path, budget, spent):
    training = {"budget": budget, "batch_size": 4, "probe_rows": 0, "save_model": False, "evaluate_every": 1}
    summary = train(write_run(**LM, training=training, schedule=ALTERNATE))
    assert summary.steps == 3
    evaluations = lines(tmp_path / "out/evaluations.jsonl")
    assert [row[next(iter(budget))] for row in evaluations] == [0, *spent]
    assert not (tmp_path / "out/model").exists()


def test_a_budget_of_seconds_counts_the_steps_alone(write_run, tmp_path):
    training = {"budget": {"seconds": 0.5}, "steps": 10_000, "batch_size": 4, "probe_rows": 0, "evaluate_every": 2}
    summary = train(write_run(**LM, training=training, schedule=ALTERNATE))
    seconds = [row["seconds"] for row in lines(tmp_path / "out/metrics.jsonl")]
    assert sum(seconds[:-1]) < 0.5 <= sum(seconds)
    assert summary.seconds == pytest.approx(sum(seconds))


def test_forward_equivalents(write_run, tmp_path):
    """An ES member that sees half of the batch counts half, a backward pass 2, with checkpointing 3."""
    schedule = {
        "estimators": {"es": {**ES, "examples_per_step": 2}, "backprop": {**ADAMW, "gradient_checkpointing": True}},
        "schedule": {"type": "blend", "weights": {"es": 1, "backprop": 1}},
    }
    summary = train(write_run(**LM, training={"steps": 2, "batch_size": 4, "probe_rows": 0}, schedule=schedule))
    row = lines(tmp_path / "out/metrics.jsonl")[0]
    assert {name: part["forward_equivalents"] for name, part in row["parts"].items()} == {"es": 2.0, "backprop": 4.0}
    assert row["forward_equivalents"] == 6.0
    assert summary.estimators["backprop"].forward_equivalents == 8.0
    assert set(row["parts"]["es"]["statistics"]) == {"gradient_norm", "cosine", "rho2"}
    assert set(row["update_norms"]) == {"es+backprop"}
