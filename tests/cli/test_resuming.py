"""Going on with a run from the command line: what is printed after an interrupt, `--resume auto`, and signals at odd times."""

import json
import os
import shlex
import signal

import pytest

from hybrid_opt.cli import main, resuming
from hybrid_opt.cli.resuming import command_that_resumes, complete_resume
from hybrid_opt.training import interrupt, trainer
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from tests.conftest import PROSE

RUN = {
    "data": {"train": str(PROSE), "validation": 0.003, "text": "text", "max_tokens": 16},
    "objective": {"type": "causal_lm"},
    "training": {"steps": 5, "batch_size": 2, "probe_rows": 0, "save_model": False},
    "schedule": {
        "estimators": {"backprop": {"type": "backprop", "learning_rate": 1e-4}},
        "schedule": {"type": "single", "estimator": "backprop"},
    },
}


@pytest.fixture
def command(write_run, monkeypatch, capsys):
    """Runs `hybrid-opt train RUN.yaml ...`, or a whole command; exit status, lines printed, and what went to stderr."""
    path = write_run(**RUN)

    def run(*options, whole=None):
        arguments = shlex.split(whole) if whole else ["hybrid-opt", "train", str(path), "--display", "lines", *options]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out.splitlines(), err

    return run


def kill_in(monkeypatch, number, *, step: int) -> None:
    """Send this process a signal in a step; with several numbers, one after another."""
    take_step = HybridOptimizer._step

    def step_and_kill(optimizer, *batches):
        if optimizer.signals.step == step:
            for one in number:
                os.kill(os.getpid(), one)
        return take_step(optimizer, *batches)

    monkeypatch.setattr(HybridOptimizer, "_step", step_and_kill)


def steps_in(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_last_line_after_an_interrupt_is_the_command_that_resumes(command, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        kill_in(patch, [number], step=1)
        code, lines, _ = command("training.seed=3", "--overwrite")
    assert code == 0
    expected = f"hybrid-opt train {tmp_path}/run.yaml --display lines training.seed=3 --resume"
    assert lines[-2:] == ["go on with", expected]
    assert steps_in(tmp_path / "out") == [0, 1]
    code, lines, _ = command(whole=lines[-1])
    assert (code, steps_in(tmp_path / "out")) == (0, [0, 1, 2, 3, 4])
    assert lines[-1] == f"metrics: {tmp_path}/out/metrics.jsonl"


def test_a_second_ctrl_c_stops_at_once_and_leaves_the_checkpoint(command, tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt, "ECHO", -1.0)
    with monkeypatch.context() as patch:
        kill_in(patch, [signal.SIGINT, signal.SIGINT], step=3)
        code, _, err = command("training.checkpoint_every=2")
    assert (code, err) == (130, "stopped\n")
    assert [entry.name for entry in (tmp_path / "out/checkpoints").iterdir()] == ["step-00000002"]
    assert command("training.checkpoint_every=2", "--resume")[0] == 0
    assert steps_in(tmp_path / "out") == [0, 1, 2, 3, 4]


def test_resume_auto_starts_goes_on_and_leaves_what_has_finished(command, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.jsonl").write_text('{"step": 7}\n')  # of a run that died before its first checkpoint
    with monkeypatch.context() as patch:
        kill_in(patch, [signal.SIGTERM], step=1)
        assert command("--resume", "auto")[0] == 0
    assert steps_in(tmp_path / "out") == [0, 1]
    evaluations = (tmp_path / "out/evaluations.jsonl").read_text()
    assert command("--resume", "auto")[0] == 0
    assert steps_in(tmp_path / "out") == [0, 1, 2, 3, 4]
    assert (tmp_path / "out/evaluations.jsonl").read_text().startswith(evaluations)
    before = {entry.name: entry.stat().st_mtime_ns for entry in (tmp_path / "out").iterdir()}
    code, lines, _ = command("--resume=auto")
    assert (code, lines) == (0, [f"{tmp_path}/out: the run has finished, after 5 steps"])
    assert {entry.name: entry.stat().st_mtime_ns for entry in (tmp_path / "out").iterdir()} == before
    code, _, err = command("--resume", "auto", "--overwrite")
    assert (code, err.splitlines()[-1][:37]) == (2, "error: command line: --resume goes on")


@pytest.mark.parametrize(("evaluation", "steps"), [(0, []), (1, [0, 1, 2, 3, 4])])
def test_a_signal_during_an_evaluation(command, tmp_path, monkeypatch, evaluation, steps):
    """Before the first step the run stops with what it has measured; after the last one it finishes."""
    evaluate, made = trainer.evaluate, []

    def evaluate_and_kill(*what):
        if len(made) == evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        made.append(evaluate(*what))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", evaluate_and_kill)
        code, lines, _ = command()
    assert code == 0
    assert (tmp_path / "out/summary.json").exists() == bool(steps)
    if not steps:
        assert lines[-1].endswith("--resume")
        assert command("--resume")[0] == 0
        assert json.loads((tmp_path / "out/summary.json").read_text())["before"] == made[0]
    assert steps_in(tmp_path / "out") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("given", "completed"),
    [
        ("train --resume run.yaml", "train --resume=newest run.yaml"),
        ("train run.yaml --resume", "train run.yaml --resume=newest"),
        ("train --resume auto run.yaml", "train --resume=auto run.yaml"),
        ("train --resume=auto run.yaml", "train --resume=auto run.yaml"),
        ("train -- run.yaml --resume", "train -- run.yaml --resume"),
    ],
)
def test_resume_stands_with_and_without_a_value(given, completed):
    arguments = given.split()
    complete_resume(arguments)
    assert " ".join(arguments) == completed


def test_the_launchers_command_is_found_among_the_processes_that_started_this_one(tmp_path, monkeypatch):
    own = ["/venv/lib/hybrid_opt/__main__.py", "train", "my run.yaml", "--resume=auto"]
    assert command_that_resumes(own) == ("go on with", "python -m hybrid_opt train 'my run.yaml' --resume")
    assert (
        command_that_resumes(["hybrid-opt", "train", "--overwrite", "--", "-.yaml"])[1]
        == "hybrid-opt train --resume -- -.yaml"
    )
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(resuming, "PROCESSES", tmp_path)
    assert command_that_resumes(own) == (
        "start as before, but with",
        "python -m hybrid_opt train 'my run.yaml' --resume",
    )
    deepspeed = (
        "/bin/python\0/venv/bin/deepspeed\0--num_gpus\0002\0--module\0hybrid_opt\0train\0run.yaml\0--resume\0auto\0"
    )
    node = "/bin/python\0-u\0-m\0deepspeed.launcher.launch\0--world_info=e30=\0--module\0hybrid_opt\0train\0run.yaml\0"
    for process, parent, line in ((os.getppid(), 500, node), (500, 400, deepspeed), (400, 1, "bash\0launch.sh\0gpu\0")):
        (tmp_path / str(process)).mkdir()
        (tmp_path / str(process) / "cmdline").write_text(line)
        (tmp_path / str(process) / "stat").write_text(f"{process} (a) b) S {parent} 7 7\n")
    assert command_that_resumes(own) == (
        "go on with",
        "deepspeed --num_gpus 2 --module hybrid_opt train run.yaml --resume",
    )
