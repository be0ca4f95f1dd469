"""`hybrid-opt verify`: right estimators pass, wrong ones do not, and what it cannot use it refuses at once."""

import json
import sys
from contextlib import contextmanager

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hybrid_opt import cli
from hybrid_opt.config.estimators import StaleGradient
from hybrid_opt.config.probing import Spsa
from hybrid_opt.estimators.probing import NoiseSum
from hybrid_opt.perturbations import dense
from hybrid_opt.studies.verify import errors, exactness, guided, registry, shaping
from hybrid_opt.studies.verify.laws import Part, expected_dimension
from hybrid_opt.studies.verify.quantity import exactly, function_of_means, mean_of
from hybrid_opt.studies.verify.real_model import estimates_for, layer_groups
from hybrid_opt.studies.verify.sampling import Trials
from hybrid_opt.studies.verify.subject import ESTIMATORS
from hybrid_opt.studies.verify.writing import verdict
from tests.conftest import GLASS, SPAM, run_document

FIELDS = ["quantity", "theory", "measured", "low", "high", "passed"]
QUICK = (shaping.second_moments, exactness.tied_weights)
SMALL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
         "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1024}  # fmt: skip


def verify(monkeypatch, *arguments) -> int:
    """What the command line exits with."""
    monkeypatch.setattr(sys, "argv", ["hybrid-opt", "verify", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


@pytest.fixture
def nothing_is_measured(monkeypatch):
    def check(trials):
        raise AssertionError("measured before the arguments were looked at")

    monkeypatch.setattr(registry, "CHECKS", (check,))


# ---------------------------------------------------------------- known losses


def test_every_row_passes_with_fewer_repeats():
    rows = list(registry.measured(Trials(seed=1, share=0.4), lambda name: None))
    assert [row.name for row in rows if not row.passed] == []
    assert len(rows) > 40
    assert len({row.name for row in rows}) == len(rows) <= 100  # as many as the probability of all is said for


def test_another_seed_measures_with_other_noise():
    first, second = (next(iter(errors.low_rank_errors(Trials(seed, 0.01)))) for seed in (1, 2))
    assert first.theory == second.theory
    assert first.measured != second.measured


def test_the_command_prints_a_table_and_writes_rows(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(registry, "CHECKS", QUICK)
    file = tmp_path / "rows.json"
    assert verify(monkeypatch, "--json", file) == 0
    out, rows = capsys.readouterr().out, json.loads(file.read_text())
    assert [list(row) for row in rows] == [FIELDS] * 7
    assert all(row["low"] == row["high"] == row["measured"] and row["passed"] is True for row in rows)
    assert {row["quantity"]: row["theory"] for row in rows}["mean square of weights, centered_rank"] == 11 / 27
    assert "7 of 7 pass" in out
    assert "largest difference by a tied weight, dense" in out
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    ("check", "failed"),
    [
        (errors.cosine_and_shrinkage, ["best factor of es"]),
        (
            guided.exact_probes,
            [
                "MSE of guided, exact, rho^2 = 0.2",
                "MSE of guided, exact, rho^2 = 0.7",
                "largest error of guided, exact, where the guide is g",
            ],
        ),
    ],
)
def test_an_estimate_that_is_too_long_fails(monkeypatch, capsys, tmp_path, check, failed):
    right = NoiseSum.add_to
    monkeypatch.setattr(NoiseSum, "add_to", lambda self, out, shard, factor: right(self, out, shard, 1.3 * factor))
    monkeypatch.setattr(registry, "CHECKS", (check,))
    file = tmp_path / "rows.json"
    assert verify(monkeypatch, "--json", file) == 1
    rows = {row["quantity"]: row for row in json.loads(file.read_text())}
    assert [name for name, row in rows.items() if not row["passed"]] == failed
    assert all(not row["low"] <= row["theory"] <= row["high"] for row in rows.values() if not row["passed"])
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert all(f"failed: {name}" in out for name in failed)


def test_weights_that_are_not_restored_fail(monkeypatch):
    """Adding noise and subtracting it again is what everybody writes first."""

    @contextmanager
    def subtracting(parameters):
        originals = {name: p.data.clone() for name, p in parameters.items()}
        yield originals
        for name, p in parameters.items():
            p.data.sub_(p.data - originals[name])

    monkeypatch.setattr(dense, "_restored", subtracting)
    rows = {row.name: row for row in exactness.restored_weights(Trials())}
    changed = [name for name, row in rows.items() if not row.passed]
    assert changed == [f"weights changed by 100 estimates, dense, whole model, {d}" for d in ("float32", "bfloat16")]


# ---------------------------------------------------------------- intervals


def test_an_interval_is_that_of_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double() + 3
    row = mean_of("a mean", 3.0, values)
    half = 4.56047 * values.std().item() / 20  # Student's t with 399 degrees of freedom and 3.4e-6 on each side
    assert (row.low, row.high) == pytest.approx((values.mean().item() - half, values.mean().item() + half))
    assert row.passed
    assert not mean_of("another", 4.0, values).passed
    assert not mean_of("too wide to tell", 3.0, values, resolution=half / 3 * 0.99).passed


def test_a_quotients_standard_error_is_that_of_the_delta_method():
    samples = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)).double() + 1
    row = function_of_means("a quotient", 1.0, samples, lambda mean: mean[..., 0] / mean[..., 1])
    x, y = samples.unbind(1)
    error = ((x - x.mean() / y.mean() * y) / y.mean()).std().item() / 2000**0.5
    assert (row.high - row.low) / 2 == pytest.approx(4.51184 * error, rel=1e-3)


def test_a_verdict_says_which_intervals_are_too_wide():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0)) + 3
    rows = [mean_of("wide", 3.0, values, 0.01), mean_of("off", 9.0, values), exactly("right", 1, 1)]
    assert verdict(rows).splitlines() == [
        "1 of 3 pass",
        "failed: wide (its interval is too wide to tell)",
        "failed: off",
    ]


def test_what_is_exact_is_equal():
    assert exactly("bits", 0, 0).passed
    assert not exactly("bits", 0, 1e-30).passed
    assert exactly("rounding", 1.0, 1.0 + 1e-7, tolerance=1e-6).passed


# ---------------------------------------------------------------- a real model


def real_run(tmp_path, estimators: dict, **data):
    path = tmp_path / "run.yaml"
    document = run_document(
        tmp_path / "out",
        model={"config": SMALL, "tokenizer": str(GLASS)},
        data={"train": str(SPAM), "prompt": "{subject}", "completion": " {label}", "max_tokens": 16},
        objective={"type": "causal_lm"},
        training={"steps": 1, "batch_size": 4},
        schedule={
            "estimators": {name: {"learning_rate": 1e-3, **options} for name, options in estimators.items()},
            "schedule": {"type": "blend", "weights": dict.fromkeys(estimators, 1.0)},
        },
    )
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_on_a_real_model_cosines_follow_their_law(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "CHECKS", QUICK[:1])
    forward = {"type": "forward_gradient", "tangents": 16}
    estimators = {
        **ESTIMATORS,
        "forward": forward,
        "stale": {"type": "stale_gradient"},
        "backprop": {"type": "backprop"},
    }
    file = tmp_path / "rows.json"
    assert verify(monkeypatch, real_run(tmp_path, estimators), "--json", file) == 0
    rows = {row["quantity"]: row for row in json.loads(file.read_text())[4:]}
    groups = ["outside the layers", "layer 0", "layer 1", "layer 2"]
    for name in (*ESTIMATORS, "forward"):
        assert all(rows[f"{name}: cosine, {group}"]["passed"] for group in groups)
        assert rows[f"{name}: cosine"]["passed"]
    dense, rademacher = (rows[f"spsa_{form}: effective dimension"]["theory"] for form in ("dense", "rademacher"))
    assert dense == rademacher + 2
    assert dense == 1 + 2 * 1024 * 16 + 3 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24 + 2 * 16) + 16
    assert rows["es_low_rank: effective dimension"]["theory"] > dense
    stale = rows["stale: cosine"]
    assert (stale["theory"], stale["passed"]) == (None, None)
    assert 0.1 < stale["measured"] < 1
    assert not any(name.startswith("backprop") for name in rows)
    assert not (tmp_path / "out").exists()


def test_a_sigma_over_which_the_loss_bends_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "CHECKS", QUICK[:1])
    path, file = real_run(tmp_path, {"spsa": {**ESTIMATORS["spsa_dense"], "sigma": 1.0}}), tmp_path / "rows.json"
    assert verify(monkeypatch, path, "--json", file) == 1
    rows = {row["quantity"]: row for row in json.loads(file.read_text())}
    assert rows["spsa: cosine"]["measured"] < 0.7 * rows["spsa: cosine"]["theory"]


def test_a_model_and_rows_are_enough(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(registry, "CHECKS", QUICK[:1])
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"Number {i} is a number like any other. " * 5}) + "\n" for i in range(40))
    )
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL)).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(GLASS).save_pretrained(tmp_path / "small")
    arguments = ("--model", tmp_path / "small", "--data", rows, "--text", "text", "--directions", 128)
    monkeypatch.setattr("hybrid_opt.studies.verify.subject.ESTIMATORS", {"es": {"type": "es", "population_size": 32}})
    verify(monkeypatch, *arguments)
    out = capsys.readouterr().out
    assert "es: effective dimension" in out
    assert f"{rows.name} " in out


def test_small_populations_get_more_estimates():
    def spsa(pairs: int) -> Spsa:
        return Spsa(type="spsa", learning_rate=1.0, pairs=pairs)

    assert [estimates_for(spsa(pairs), 256) for pairs in (1, 3, 16, 64)] == [256, 86, 16, 16]
    assert estimates_for(StaleGradient(type="stale_gradient", learning_rate=1.0), 256) == 16


def test_layers_are_at_most_eight_groups():
    names = [f"model.layers.{i}.mlp.weight" for i in range(30)] + ["lm_head.weight"]
    groups = layer_groups(names)
    assert list(groups)[:2] == ["layers 0 to 3", "layers 4 to 7"]
    assert list(groups)[-2:] == ["layers 28 to 29", "outside the layers"]
    assert len(groups) == 9
    assert sorted(name for group in groups.values() for name in group) == sorted(names)


@pytest.mark.parametrize(("distribution", "whole"), [("gaussian", 50), ("rademacher", 48), ("sphere", 48)])
def test_the_whole_of_49_values_has_its_closed_form(distribution, whole):
    config = Spsa(type="spsa", learning_rate=1.0, perturbation={"type": "dense", "distribution": distribution})
    part = Part([((6, 8), 2.5), ((1,), 0.1)])
    assert expected_dimension(config, part, part) == pytest.approx(whole)


def test_a_matrixs_law_is_that_of_its_mean_square_error():
    config = Spsa(type="spsa", learning_rate=1.0, pairs=3, perturbation={"type": "low_rank", "noise_rank": 4})
    part = Part([((6, 8), 2.5)])
    assert expected_dimension(config, part, part) == 48 + 1 + 2 * 15 / 4


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "nowhere/rows.json"], "there is no folder"),
        (["--model", "smollm2-135m"], "--model needs --data too"),
        (["--data", "rows.jsonl"], "--data needs --model too"),
        (["--text", "text"], "--text needs --model too"),
        (["missing.yaml"], "missing.yaml: no such file"),
        (["--model", str(GLASS), "--data", "missing.jsonl", "--text", "text"], "missing.jsonl: no such file"),
        (["--model", str(GLASS), "--data", str(SPAM)], "exactly one of prompt"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(monkeypatch, capsys, nothing_is_measured, arguments, message):
    assert verify(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_has_no_gradient_is_refused_at_once(monkeypatch, capsys, nothing_is_measured, write_run):
    rewards = {"type": "reward", "rewards": [{"function": "hybrid_opt.tasks.conciseness:score"}]}
    data = {"train": str(SPAM), "prompt": "{subject}", "max_tokens": 16}
    path = write_run(objective=rewards, data=data, schedule="es_only")
    assert verify(monkeypatch, path) == 2
    assert "objective: reward has no gradient to compare estimates with" in capsys.readouterr().err


def test_options_and_a_run_file_are_refused_together(monkeypatch, capsys, nothing_is_measured, write_run):
    assert verify(monkeypatch, write_run(), "--model", GLASS) == 2
    assert "--model is for measuring without a run file" in capsys.readouterr().err


def test_too_few_directions_are_refused(monkeypatch, nothing_is_measured):
    assert verify(monkeypatch, "--directions", 16) == 2
