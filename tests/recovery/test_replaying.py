"""Weights of any step of a finished run, from its ledger; and a fine-tune shipped as one."""

import gzip
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from hybrid_opt import UserError, build, load_model, load_run, load_tokenizer
from hybrid_opt.cli import main
from hybrid_opt.config.run import Model
from hybrid_opt.display.progress import Silence
from hybrid_opt.recovery.export import export
from hybrid_opt.recovery.replaying import replay
from tests.conftest import ROOT

ES = {"type": "es", "population_size": 6, "sigma": 0.01, "learning_rate": 1e-3}
ALONE = {"estimators": {"es": ES}, "schedule": {"type": "single", "estimator": "es"}}
TURNS = {
    "estimators": {"es": ES, "backprop": {"type": "backprop", "learning_rate": 1e-3}},
    "schedule": {"type": "alternate", "pattern": {"es": 2, "backprop": 1}},
}
TRAINING = {"steps": 5, "batch_size": 2, "probe_rows": 0}


def train(path, *overrides):
    return build(load_run(path, overrides), display=Silence()).train()


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, two) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def run(write_run, tmp_path):
    train(write_run(schedule=ALONE, training=TRAINING))
    return tmp_path / "out"


def test_the_command_makes_the_models_of_the_last_step_and_of_any(run, tmp_path, monkeypatch, capsys):
    final = load_file(run / "model/model.safetensors")
    for step, place in ((None, run / "replayed"), (2, tmp_path / "two")):
        options = [] if step is None else ["--to-step", str(step), "--output", str(place)]
        monkeypatch.setattr(sys, "argv", ["hybrid-opt", "replay", str(run), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        taken = 5 if step is None else step
        assert f"step {taken}: the model at the start and {taken} steps of the ledger" in capsys.readouterr().out
        assert equal(load_file(place / "model/model.safetensors"), final) == (step is None)
    assert (run / "replayed/model/tokenizer.json").exists()


def test_steps_between_snapshots_are_reached_and_others_are_named(write_run, tmp_path):
    train(write_run(schedule=TURNS, training={**TRAINING, "steps": 8, "snapshots": "switch", "keep_checkpoints": 1}))
    run, final = tmp_path / "out", load_file(tmp_path / "out/model/model.safetensors")
    # es in steps 0, 1, 3, 4, 6, 7; the snapshot after step 5 is left
    found = replay(run)
    assert (found.step, found.base) == (8, 6)
    assert equal(final, weights(found.optimizer.engine.model))
    assert (replay(run, 2).step, replay(run, 2).base) == (2, 0)
    with pytest.raises(UserError, match="no way leads to step 5; reached are 0 to 2, 6 to 8"):
        replay(run, 5)


def test_an_export_is_the_model(run, tmp_path):
    made = export(run, tmp_path / "ship")
    assert sorted(place.name for place in made.folder.iterdir()) == ["ledger.jsonl.gz", "run.yaml"]
    assert (made.steps, made.bytes) == (5, (made.folder / "ledger.jsonl.gz").stat().st_size)
    final = load_file(run / "model/model.safetensors")
    own = Model(name=str(made.folder))
    assert equal(final, weights(load_model(own, None, seed=1)))
    assert load_tokenizer(own).get_vocab() == load_tokenizer(Model(name=str(ROOT / "tests/data/glass_en"))).get_vocab()


def test_an_export_is_a_model_to_train(run, tmp_path, write_run):
    export(run, tmp_path / "ship")
    summary = train(write_run(model={"name": str(tmp_path / "ship")}, training=TRAINING), f"output={tmp_path / 'more'}")
    first = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert summary.before["loss"] == first["loss"]


def test_what_cannot_be_exported_or_replayed(run, tmp_path, write_run):
    with pytest.raises(UserError, match="it is there already"):
        export(run, run)
    with pytest.raises(UserError, match="no such folder"):
        replay(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no ledger[.]jsonl, so no run has left it"):
        replay(tmp_path / "empty")
    with pytest.raises(UserError, match="no way leads to step 9; reached are 0 to 5"):
        replay(run, 9)
    train(write_run(schedule=TURNS, training=TRAINING), f"output={tmp_path / 'turns'}")
    with pytest.raises(UserError, match="step 2 is not in it, so base model and ledger do not give the final weights"):
        export(tmp_path / "turns", tmp_path / "other")
    export(run, tmp_path / "ship")
    packed = tmp_path / "ship/ledger.jsonl.gz"
    lines = gzip.decompress(packed.read_bytes())
    packed.write_bytes(gzip.compress(lines.replace(b'"weights":"', b'"weights":"0', 1)))
    with pytest.raises(UserError, match="no way leads to step 5; reached are 0"):
        replay(tmp_path / "ship", 5)
