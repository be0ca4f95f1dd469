"""Predicted memory by hand, against real autograd, and against a real process."""

import json
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from hybrid_opt.config import load_run
from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.run import Model
from hybrid_opt.errors import UserError
from hybrid_opt.objectives.contract import FunctionObjective
from hybrid_opt.planning.batches import largest_batches
from hybrid_opt.planning.calibration import alone, measured
from hybrid_opt.planning.live_memory import LiveMemory
from hybrid_opt.planning.prediction import Acting, Prediction, Predictor
from hybrid_opt.planning.report import planned
from hybrid_opt.planning.sizes import CONFIGS, config_of, device_bytes, sizes_table
from hybrid_opt.planning.step_memory import PretendedModel
from hybrid_opt.planning.traffic import totals_of
from tests.conftest import GLASS, TINY, tiny_model, token_batch, token_losses

LLAMA = Model(config={"model_type": "llama", **TINY["llama"]}, tokenizer=str(GLASS))
WEIGHTS = sum(p.numel() for p in tiny_model().parameters())
ES = {"type": "es", "population_size": 4, "learning_rate": 1e-3, "fitness_shaping": "none", "update": {"type": "adam"}}
ADAMW = {"type": "backprop", "learning_rate": 1e-3}
TURNS = {"type": "alternate", "pattern": {"backprop": 1, "es": 3}}


def test_live_memory_by_hand():
    """Storages of 4,000 bytes: y, then y and z, then z alone; what was known before does not count."""
    with FakeTensorMode():
        x = torch.zeros(1000)
        with LiveMemory([x]) as live:
            y = x * 2
            z = y.view(10, 100) + 1
            assert live.total == 8000
            del y
            assert live.total == 4000
            x.add_(1)
            z.mul_(2)
            assert (live.total, live.peak) == (4000, 8000)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("owned", [".*", "layers.1"])
def test_a_pretended_step_takes_what_a_real_one_does(checkpointing, owned):
    """To the byte: the same counting on tensors with values."""
    config = Backprop(type="backprop", learning_rate=1, gradient_checkpointing=checkpointing)
    objective, batch = FunctionObjective(token_losses), token_batch(examples=4, tokens=16)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 0] = 0  # without padding transformers makes no mask, if it can see that
    pretended = PretendedModel(LLAMA, None, "float32")
    names = [name for name in pretended.movable if owned == ".*" or owned in name]
    found = pretended.backprop_bytes(config, objective, batch, 3, names)
    assert pretended.backprop_bytes(config, objective, batch, 3, names) == found
    real = PretendedModel(LLAMA, None, "float32")
    real.mode, real.module = FakeTensorMode(), tiny_model()
    real._pretended = lambda part: part
    real.mode = torch.enable_grad()  # in place of pretending
    assert real.backprop_bytes(config, objective, batch, 3, names) == found
    assert found[0] == 4 * sum(p.numel() for name, p in tiny_model().named_parameters() if name in names)


def run_of(write_run, schedule=TURNS, estimators=None, **more):
    model = {
        "config": {"model_type": "llama", **TINY["llama"], "vocab_size": 1024},
        "tokenizer": str(GLASS),
        **more.pop("model", {}),
    }
    return load_run(
        write_run(
            schedule={"estimators": estimators or {"es": ES, "backprop": ADAMW}, "schedule": schedule},
            model=model,
            **more,
        )
    )


def predicted(run, world_size=1) -> list[Prediction]:
    dtype = "bfloat16" if getattr(run.engine, "bf16", False) else run.model.dtype
    model = PretendedModel(run.model, run.peft, dtype)
    return Predictor(run, model, largest_batches(run), world_size=world_size).phases()


def test_what_lasts_by_hand(write_run):
    """Weights n: float32 takes 4 n, AdamW 8 n, Adam of ES 8 n; in bfloat16 2 n, and masters 4 n."""
    run = run_of(write_run)
    (found,) = predicted(run)
    n = sum(
        math.prod(shape)
        for shape in PretendedModel(run.model, None, "float32").module.state_dict().values()
        for shape in [shape.shape]
    )
    rest = found.lasting["weights"] - 4 * n  # tables of angles
    assert 0 <= rest < 1000
    assert found.lasting == {"weights": 4 * n + rest, "AdamW's state": 8 * n, "es: adam's state": 8 * n}
    assert found.acting["backprop"].held == {"gradients": 4 * n}
    assert found.peak == sum(found.lasting.values()) + max(acting.peak for acting in found.acting.values())
    (narrow,) = predicted(run_of(write_run, model={"dtype": "bfloat16"}))
    assert narrow.lasting["masters"] == 4 * n
    assert narrow.acting["backprop"].held == {"gradients": 2 * n + 4 * n}


@pytest.mark.parametrize(("stage", "weights", "gradients"), [(1, 2, 2 + 2), (2, 2, 1 + 2), (3, 1, 1 + 2)])
def test_what_zero_shares_out_by_hand(write_run, stage, weights, gradients):
    """Two ranks, bfloat16: a rank has half of masters and AdamW's state, from stage 2 of the gradients, at 3 of the weights, and a bucket."""
    run = run_of(
        write_run,
        engine={"type": "zero", "zero_stage": stage, "bf16": True},
        estimators={"es": {**ES, "update": {"type": "sgd"}}, "backprop": ADAMW},
    )
    (found,) = predicted(run, world_size=2)
    n = found.lasting["masters"] // 2
    assert found.lasting["AdamW's state"] == 4 * n
    assert found.lasting["weights"] == pytest.approx(weights * n, rel=0.02)
    assert ("gathered weights" in found.lasting) == (stage == 3)
    assert found.acting["backprop"].held["gradients"] == gradients * n


def test_who_acts_together_holds_together():
    """40 always; one holds 10 and passes 30, then 5, the other holds 20 and passes 25."""
    both = {
        "a": Acting({"gradients": 10}, {"activations": 30, "update": 5}),
        "b": Acting({"noise": 20}, {"activations": 25}),
    }
    assert Prediction(None, {"weights": 40}, both).peak == 40 + 45
    assert Prediction(None, {"weights": 40}, both, together=True).peak == 40 + 10 + 20 + 30


def test_a_real_process_takes_what_was_predicted(write_run):
    """10 million weights; within 15 %, as on SmolLM2-135M in the README."""
    shape = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 3,
        "vocab_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    run = run_of(write_run, model={"config": {"model_type": "llama", **shape}})
    model, batches = PretendedModel(run.model, None, "float32"), largest_batches(run)
    for who, one in alone(run).items():
        measured(one)  # what libraries load and keep at their first use
        (phase,) = Predictor(one, model, batches).phases()
        assert phase.peak / measured(one).peak == pytest.approx(1, abs=0.15), who


def test_totals_by_hand(write_run):
    """Eight steps of backprop 1, es 3: two of backprop, six of ES with 4 members and 4 examples, on two ranks at stage 3, 100 weights of 2 bytes."""
    run = run_of(write_run, engine={"type": "zero", "zero_stage": 3, "bf16": True})
    found = totals_of(
        run,
        8,
        tokens={"es": 40, "backprop": 40},
        owned={"es": 100, "backprop": 100},
        weights=100,
        width=2,
        world_size=2,
    )
    backprop, es = found["backprop"], found["es"]
    assert (backprop.steps, backprop.forwards, backprop.backwards, backprop.tokens, backprop.sent) == (
        2,
        2,
        2,
        80,
        2 * 3 * 100 * 2 // 2,
    )
    assert (es.steps, es.forwards, es.backwards, es.tokens) == (6, 24, 0, 24 * 40)
    assert es.sent == 6 * (4 * 4 * 4 // 2 + 4 // 2 * 100 * 2 // 2)


def test_the_plan_of_a_run(write_run, tmp_path):
    written = {}
    phases = {
        "type": "phases",
        "phases": [
            {"steps": 4, "schedule": {"type": "single", "estimator": "backprop"}},
            {"schedule": {"type": "single", "estimator": "es"}},
        ],
    }
    parts = list(planned(run_of(write_run, phases), 10, 1, calibrate=True, allow_code=False, write=written.update))
    assert [phase["phase"] for phase in written["phases"]] == [0, 1]
    assert set(written["phases"][1]["acting"]) == {"es"}
    assert written["totals"]["backprop"]["steps"] == 4
    assert set(written["calibration"]) == {"backprop", "es"}
    assert written["calibration"]["es"]["seconds"] > 0
    assert json.dumps(written)
    assert len(parts) == 6


def test_sizes_are_the_published_ones():
    published = {
        "qwen2.5-0.5b": 0.494,
        "qwen3-0.6b": 0.596,
        "qwen3-1.7b": 1.72,
        "qwen3-4b": 4.02,
        "qwen3-8b": 8.19,
        "qwen3-14b": 14.77,
        "qwen3-32b": 32.76,
    }
    assert published.keys() == CONFIGS.keys()
    for name, billions in published.items():
        _, model = config_of(name, "qwen3")
        found = sum(p.numel() for p in PretendedModel(model, None, "bfloat16").module.parameters())
        assert found / 1e9 == pytest.approx(billions, rel=0.003), name


def test_a_size_by_hand():
    """AdamW with bfloat16 weights, float32 masters, two moments, gradients in both, and what its step makes: 2 + 4 + 8 + 2 + 4 + 4 bytes a weight."""
    table, legend = sizes_table([str(GLASS)], "12MB", 8, 1, 8)
    cells = dict(
        zip(
            [column.header for column in table.columns],
            [next(iter(column.cells)) for column in table.columns],
            strict=True,
        )
    )
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(GLASS).parameters())
    assert cells["AdamW"] == f"[red]{24 * weights / 1e9:.3g} no[/]"
    assert cells["ES"].startswith("[green]0.00")
    assert "no: more than 0.012 GB" in legend


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: config_of("qwen3-5b", "qwen3"),
            "--model-config: 'qwen3-5b' is no known size and no folder with a config.json",
        ),
        (lambda: device_bytes("h10"), "--device: 'h10' is no known device"),
    ],
)
def test_what_is_not_known_is_said(ask, message):
    with pytest.raises(UserError) as error:
        ask()
    assert message in str(error.value)
