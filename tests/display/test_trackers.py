"""Reports to experiment trackers: TensorBoard for real, the events of all others by a callback that notes what it is told."""

import io
import json
import os
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from hybrid_opt import Trainer, UserError, build, load_run
from hybrid_opt.cli import main
from hybrid_opt.config.reporting import INTEGRATIONS
from hybrid_opt.display.progress import Lines, Silence
from hybrid_opt.display.trackers import Trackers, step_scalars
from hybrid_opt.run_files.run_folder import RunFolder
from tests.conftest import PROSE, tiny_model, token_batch, token_losses

ES = {"type": "es", "population_size": 6, "sigma": 0.01, "learning_rate": 1e-4, "fitness_shaping": "none"}
BLEND = {
    "estimators": {"es": ES, "backprop": {"type": "backprop", "learning_rate": 1e-3}},
    "schedule": {
        "type": "phases",
        "phases": [
            {"steps": 3, "schedule": {"type": "alternate", "pattern": {"es": 1, "backprop": 1}}},
            {"schedule": {"type": "blend", "weights": {"es": 0.1, "backprop": 1.0}}},
        ],
    },
}


@pytest.fixture
def run_path(write_run):
    return write_run(
        data={"train": str(PROSE), "validation": 0.01, "text": "text", "max_tokens": 32},
        objective={"type": "causal_lm"},
        training={"steps": 7, "batch_size": 2, "evaluate_every": 2, "probe_rows": 0, "checkpoint_every": 2, "evaluation_rows": 4},
        schedule=BLEND,
    )  # fmt: skip


def train(path, *overrides, **options):
    return build(load_run(path, overrides), display=Silence(), **options).train()


def die_in(trainer: Trainer, step: int, stop) -> None:
    """Call `stop` when the trainer asks for a step."""
    take_step = trainer.optimizer.step
    trainer.optimizer.step = lambda *batches: stop() if trainer.optimizer.signals.step == step else take_step(*batches)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected_scalars(folder) -> dict[str, dict[int, float]]:
    """What trackers should show, from the files of the run folder: {tag: {step: value}}."""
    found: dict[str, dict[int, float]] = {}
    totals = dict.fromkeys(("tokens", "seconds", "forward_equivalents"), 0.0)
    for row in lines(folder / "metrics.jsonl"):
        totals = {name: total + row[name] for name, total in totals.items()}
        whole = {
            name: row[name] for name in ("loss", "loss_spread", "forwards", "backwards", "peak_memory_bytes", *totals)
        }
        whole |= {f"total_{name}": total for name, total in totals.items()}
        for who, part in row["parts"].items():
            own = {
                "loss": row["losses"][who],
                "weight": row["weights"][who],
                "learning_rate": row["learning_rates"][who],
            }
            whole |= {
                f"{who}/{name}": v for name, v in {**own, "seconds": part["seconds"], **part["statistics"]}.items()
            }
        for who, norms in row["update_norms"].items():
            whole[f"{who}/update_norm"] = torch.tensor(list(norms.values()), dtype=torch.float64).norm().item()
        for name, value in whole.items():
            if value is not None:
                found.setdefault(f"train/{name}", {})[row["step"] + 1] = value
    for row in lines(folder / "evaluations.jsonl"):
        found.setdefault("eval/loss", {})[row["step"]] = row["loss"]
    return found


def test_the_names_are_those_of_transformers():
    assert set(INTEGRATIONS) == set(INTEGRATION_TO_CALLBACK)


def test_tensorboard_shows_every_number_of_a_run_that_died_and_was_resumed(run_path, tmp_path):
    """It died after step 5, whose events are on disk; from the checkpoint at 4 it is taken again."""
    report = ("report_to=tensorboard", f"output={tmp_path / 'reported'}")
    dying = build(load_run(run_path, report), display=Silence())
    callback = dying.display.displays[1].callbacks["tensorboard"]
    died = RuntimeError("power cut")

    def stop():
        raise died

    die_in(dying, 5, stop)
    with pytest.raises(RuntimeError, match="power cut"):
        dying.train()
    assert isinstance(callback, TensorBoardCallback)
    assert callback.tb_writer is None  # closed

    train(run_path, *report, resume=True)
    folder = tmp_path / "reported"
    assert len(list((folder / "logs").iterdir())) == 2
    events = EventAccumulator(str(folder / "logs")).Reload()
    expected = expected_scalars(folder)
    assert {"train/es/snr", "train/es/cosine", "train/backprop/update_norm", "train/es+backprop/update_norm"} < set(
        expected
    )
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag, values in expected.items():
        shown = {event.step: event.value for event in events.Scalars(tag)}
        assert len(shown) == len(events.Scalars(tag))
        assert shown == pytest.approx(values, rel=1e-6), tag
    assert len(expected["train/loss"]) == 7
    assert list(expected["eval/loss"]) == [0, 2, 4, 6, 7]
    hyperparameters = events.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(hyperparameters)["schedule.estimators.es.population_size"] == 6

    train(run_path)  # without a report
    one, two = load_file(folder / "model/model.safetensors"), load_file(tmp_path / "out/model/model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_new_run_leaves_nothing_of_the_old_ones_report(run_path, tmp_path):
    short = ("report_to=tensorboard", "training.steps=1", "training.save_model=false")
    train(run_path, *short)
    (first,) = (tmp_path / "out/logs").iterdir()
    train(run_path, *short, overwrite=True)
    assert first not in set((tmp_path / "out/logs").iterdir())
    assert len(list((tmp_path / "out/logs").iterdir())) == 1


class Noting(TrainerCallback):
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda args, state, control, **given: self.told.append((name, state.global_step, args, state, given))


@pytest.fixture
def noting(monkeypatch):
    """All callbacks that are made in place of wandb's."""
    made = []

    def make():
        made.append(Noting())
        return made[-1]

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", make)
    monkeypatch.setitem(INTEGRATIONS, "wandb", {})
    return made


def test_a_callback_is_told_what_a_transformers_trainer_would_tell_it(run_path, tmp_path, noting):
    trainer = build(load_run(run_path, ["report_to=[wandb]"]), display=Silence())
    die_in(trainer, 3, lambda: os.kill(os.getpid(), signal.SIGINT) or trainer.optimizer.__class__.step(
        trainer.optimizer, trainer.batches.batch_at(3)
    ))  # fmt: skip
    assert not trainer.train().finished
    train(run_path, "report_to=wandb", resume=True)
    first, second = (callback.told for callback in noting)
    step = ["on_step_end", "on_log"]
    evaluation = ["on_log", "on_evaluate"]
    assert [event for event, *_ in first] == [
        "on_init_end", "on_train_begin", *evaluation, *step, *step, *evaluation, *step, *step, "on_train_end",
    ]  # fmt: skip
    assert [at for _, at, *_ in first] == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4]
    assert [(event, at) for event, at, *_ in second] == [
        *(("on_init_end", 4), ("on_train_begin", 4), ("on_log", 4), ("on_evaluate", 4)),
        *((event, at) for at in (5, 6) for event in step),
        *(("on_log", 6), ("on_evaluate", 6), ("on_step_end", 7), ("on_log", 7)),
        *(("on_log", 7), ("on_evaluate", 7), ("on_train_end", 7)),
    ]
    logs = {at: given["logs"] for event, at, *_, given in second if event == "on_log" and "loss" in given["logs"]}
    rows = lines(tmp_path / "out/metrics.jsonl")
    assert {at: log["loss"] for at, log in logs.items()} == {row["step"] + 1: row["loss"] for row in rows[4:]}
    assert logs[7]["total_tokens"] == sum(row["tokens"] for row in rows)
    arguments, state, given = first[0][2:]
    assert isinstance(arguments, TrainingArguments)
    assert (arguments.run_name, arguments.output_dir) == ("out", str(tmp_path / "out/logs"))
    assert arguments.to_dict()["training.batch_size"] == 2
    assert json.loads(arguments.to_json_string()) == arguments.to_dict()
    assert (state.max_steps, state.is_world_process_zero) == (7, True)
    assert given["model"] is trainer.optimizer.engine.model


class Failing(TrainerCallback):
    """Fails at the third step's log, as a server may."""

    def on_log(self, args, state, control, **given):
        if state.global_step == 3:
            raise ConnectionError("no route to host")


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(run_path, noting, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mlflow", Failing)
    monkeypatch.setitem(INTEGRATIONS, "mlflow", {})
    console = Console(file=io.StringIO(), width=200)
    run = load_run(run_path, ["report_to=[mlflow, wandb]", "training.steps=5", "training.save_model=false"])
    assert build(run, display=Lines(console)).train().finished
    assert (
        console.file.getvalue().count("report_to: mlflow failed after 3 steps, and is left out: no route to host") == 1
    )
    assert noting[0].told[-1][:2] == ("on_train_end", 5)


class NotLoggedIn(TrainerCallback):
    def on_train_begin(self, args, state, control, **given):
        raise RuntimeError("api_key not configured")


def test_a_tracker_that_does_not_start_ends_the_run_and_closes_the_others(run_path, noting, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mlflow", NotLoggedIn)
    monkeypatch.setitem(INTEGRATIONS, "mlflow", {})
    with pytest.raises(UserError, match="report_to: mlflow does not start: api_key not configured"):
        train(run_path, "report_to=[wandb, mlflow]")
    assert [event for event, *_ in noting[0].told] == ["on_init_end", "on_train_begin", "on_train_end"]


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_missing_package_is_explained_before_anything_is_done(command, run_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(INTEGRATIONS, "wandb", {"wandb_is_not_here": "wandb", "wandb_is_not.here": "wandb-more"})
    monkeypatch.setattr("hybrid_opt.training.build.load_model", lambda *_: pytest.fail("a model is loaded"))
    monkeypatch.setattr("sys.argv", ["hybrid-opt", command, str(run_path), "report_to=[tensorboard, wandb]"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message == (
        "error: command line: report_to: wandb needs wandb and wandb-more, not installed here: pip install wandb wandb-more, or "
        "write report_to: none\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("tensorbord", "report_to: unknown tracker 'tensorbord' (did you mean 'tensorboard'?); write none, or some of azure_ml"),
        ("[tensorboard, all]", "report_to: unknown tracker 'all'"),
        ("[wandb, wandb]", "report_to: wandb, wandb: write each name once"),
        ("7", "report_to: input should be a valid string, got 7, or expected a list"),
    ],
)  # fmt: skip
def test_a_wrong_name_is_explained(value, expected, run_path):
    with pytest.raises(UserError) as caught:
        load_run(run_path, [f"report_to={value}"])
    assert expected in str(caught.value)


def test_from_a_script(tmp_path):
    given = {"schedule": {"estimators": {"es": ES}, "schedule": {"type": "single", "estimator": "es"}}, "steps": 2}
    with pytest.raises(UserError, match=r"report_to: trackers need an output folder.* pass output="):
        Trainer(tiny_model(), token_losses, [token_batch()], **given, report_to="tensorboard")
    trainer = Trainer(
        tiny_model(), token_losses, [token_batch()], **given, output=tmp_path / "out", display=Silence(), report_to=["tensorboard"]
    )  # fmt: skip
    trainer.train()
    events = EventAccumulator(str(tmp_path / "out/logs")).Reload()
    assert [event.step for event in events.Scalars("train/es/loss")] == [1, 2]
    hyperparameters = json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
    assert (hyperparameters["steps"], hyperparameters["schedule.estimators.es.sigma"]) == (2, 0.01)


def test_a_tensorboard_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    trackers = Trackers("tensorboard", RunFolder(tmp_path / "out"), {})
    trackers.start(0, None)
    trackers.stop()
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    assert not (tmp_path / "out").exists()


def test_no_scalar_where_nothing_was_measured():
    row = dict.fromkeys(("loss", "loss_spread", "tokens", "seconds", "forwards", "backwards", "forward_equivalents"))
    assert step_scalars({**row, "peak_memory_bytes": 7, "parts": {}, "update_norms": {}}) == {"peak_memory_bytes": 7}
