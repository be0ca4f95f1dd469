"""Runs of several processes as users start them: launchers, Ctrl-C and --resume, ranks that die. Real processes on a CPU."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import GLASS, PROSE, ROOT, run_document
from tests.training.test_trainer import ALTERNATE, LM, final_weights, lines

STEPS = 24
LIMIT = 180
"""Seconds for a process, many times what it needs."""
BIN = Path(sys.executable).parent
LAUNCH = "examples/deepspeed/launch.sh"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run file; runs differ only in where they write."""
    folder = tmp_path_factory.mktemp("launched")
    training = {"steps": STEPS, "batch_size": 4, "probe_rows": 4}
    data = {**LM["data"], "validation": 0.005, "max_tokens": 32}
    document = run_document(
        folder / "out", **LM | {"data": data, "engine": {"type": "local"}}, training=training, schedule=ALTERNATE
    )
    (folder / "run.yaml").write_text(json.dumps(document))
    (folder / "hosts").write_text("machine-a slots=1\nmachine-b slots=1\n")
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(**more) -> dict[str, str]:
    """For a process; `PATH` so that the launchers of this Python are found."""
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PORT": free_port(), **more}
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"} | {k: str(v) for k, v in settings.items()}


@contextmanager
def started(*command, env=None, **more):
    """A process with a group of its own, of which nothing is left behind, and which ends after `LIMIT` seconds."""
    process = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=env or environment(**more), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def end():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # torchrun's ranks are not of its group: it ends them
            with suppress(subprocess.TimeoutExpired):
                process.wait(40)
            os.killpg(process.pid, signal.SIGKILL)

    limit = threading.Timer(LIMIT, end)
    limit.start()
    try:
        yield process
    finally:
        limit.cancel()
        end()
        process.stdout.close()
        process.wait()


def finished(process, expected: int | None = 0) -> str:
    """What a process and its children printed, after they have all ended."""
    output, _ = process.communicate()
    assert expected is None or process.returncode == expected, output
    return output


def run(*command, expected: int | None = 0, **more) -> str:
    with started(*command, **more) as process:
        return finished(process, expected)


def on_two_nodes(way: str, *arguments, **more) -> list[str]:
    """Two launchers, each for a machine with one process."""
    port = free_port()
    nodes = {"PORT": port, "MASTER": "127.0.0.1", "SLOTS": 1, **more}
    with (
        started(LAUNCH, way, *arguments, NODE=0, **nodes) as one,
        started(LAUNCH, way, *arguments, NODE=1, **nodes) as two,
    ):
        return [finished(one), finished(two)]


def same_weights(one: Path, two: Path, atol: float = 0.0) -> None:
    a, b = final_weights(one), final_weights(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


@pytest.fixture(scope="module")
def whole(place):
    """A run of two processes by the deepspeed launcher that nothing disturbs, and what it printed."""
    output = run(LAUNCH, "cpu", place / "run.yaml", f"output={place / 'whole'}", STAGE=2)
    return place / "whole", output


def test_a_launched_run_leaves_the_folder_of_a_single_process_and_rank_0_speaks(whole):
    folder, output = whole
    assert sorted(p.name for p in folder.iterdir()) == [
        "curves.png", "evaluations.jsonl", "ledger.jsonl", "machine.json", "metrics.jsonl", "model", "process.json", "run.yaml",
        "summary.json",
    ]  # fmt: skip
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == list(range(STEPS))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"]
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert AutoModelForCausalLM.from_pretrained(folder / "model").config.model_type == "llama"
    for once in ("after 0 steps: loss", f"after {STEPS} steps: loss", "loss decrease", "model: "):
        assert output.count(once) == 1, output
    assert "Traceback" not in output
    assert "warning" not in output


def test_launchers_and_machines_make_no_difference(place, whole):
    outputs = on_two_nodes("torchrun-node", place / "run.yaml", f"output={place / 'nodes'}", STAGE=2)
    same_weights(whole[0], place / "nodes", atol=1e-6)
    assert "after 0 steps" in outputs[0]
    assert "after 0 steps" not in outputs[1]


ALONE = """
import sys
from hybrid_opt.cli import main
for arguments in map(str.split, sys.argv[1:]):
    sys.argv = ["hybrid-opt", *arguments]
    try:
        main()
    except SystemExit as end:
        print("exit", end.code or 0, flush=True)
"""


def test_interrupted_and_resumed_on_other_machines_is_uninterrupted_bitwise(place, whole):
    out, arguments = place / "out", [place / "run.yaml", f"output={place / 'out'}"]
    with started(LAUNCH, "torchrun", *arguments, STAGE=2) as process:
        wait_for_steps(out, 5)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the launcher and to all ranks
        output = finished(process, expected=None)
    assert output.count("stopping after the current step") == 1, output
    assert "go on with the same command and --resume" in output
    assert re.search(rf"^torchrun --nproc_per_node 2 .* output={out} --resume$", output, re.MULTILINE), output
    assert len(list((out / "checkpoints").iterdir())) == 1
    assert len(lines(out / "metrics.jsonl")) < STEPS

    # One process cannot go on with what two have saved, but it can start from the whole model; alone it trains as two do.
    (whole_model,) = out.glob("checkpoints/step-*/model")
    train, zero = f"train {place / 'run.yaml'}", "engine.type=zero engine.zero_stage=2"
    output = run(
        sys.executable, "-c", ALONE,
        f"{train} {zero} output={out} --resume",
        f"{train} {zero} output={out} --local_rank 0",
        f"--local_rank=0 {train} {zero} model.name={whole_model} output={place / 'from'} training.steps=1",
        f"{train} {zero} output={place / 'alone'}",
    )  # fmt: skip
    refused = re.search(r"error: .* saved by 2 ranks under ZeRO-2, and this run has 1 rank under ZeRO-2; (.*)", output)
    assert refused, output
    assert f"model.name={whole_model} output=" in refused[1]
    assert f"{out} holds a run already; go on with it by --resume" in output
    assert output.count("exit 2") == 2, output
    assert json.loads((place / "from/summary.json").read_text())["steps"] == 1
    same_weights(whole[0], place / "alone", atol=1e-3)

    on_two_nodes("node", *arguments, "--resume", STAGE=2, HOSTS=place / "hosts")
    same_weights(whole[0], out)
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == list(range(STEPS))
    assert not (out / "checkpoints").exists()


def wait_for_steps(folder: Path, steps: int, seconds: float = 120) -> None:
    deadline, metrics = time.time() + seconds, folder / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert time.time() < deadline, f"{folder}: no {steps} steps in {seconds} seconds"
        time.sleep(0.01)


def test_a_wrong_run_file_gives_a_message_and_the_launcher_ends(place):
    output = run(LAUNCH, "cpu", place / "run.yaml", "schedule=nothing", expected=2)
    assert re.search(r"^error.*: schedule: 'nothing' is neither a file nor a shipped recipe", output, re.MULTILINE)
    assert "Traceback" not in output


def test_the_local_engine_refuses_to_be_launched(place):
    output = run(
        sys.executable, "-m", "hybrid_opt", "train", place / "run.yaml", f"output={place / 'local'}", expected=2,
        RANK=1, WORLD_SIZE=2, LOCAL_RANK=1,
    )  # fmt: skip
    assert output.startswith("error (rank 1): ")
    assert "engine.type: local runs in one process, but the launcher started 2" in output
    assert not (place / "local").exists()


PAIRS = """
import os, sys
from hybrid_opt.engines import rank_loss
import hybrid_opt.engines.zero, hybrid_opt.training.build, hybrid_opt.cli
rank_loss.EVERY, rank_loss.PATIENCE = 1.0, 6.0
run, folder, resumed_port, *ports = sys.argv[1:]
os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}

def begin(pair, port, *more):
    processes = []
    for rank in range(2):
        if (process := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
            os.dup2(os.open(f"{folder}/{pair}.{rank}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
            sys.argv = ["hybrid-opt", "train", run, "engine.type=zero", "engine.zero_stage=2", f"output={folder}/{pair}", *more]
            hybrid_opt.cli.main()
            sys.exit(0)
        processes.append(process)
        print(process, flush=True)
    return processes

begin(0, ports[0])
killed = begin(1, ports[1], "training.checkpoint_every=2")
for pair, port in enumerate(ports[2:], start=2):
    begin(pair, port, "training.steps=100000")
for _ in range(2 * len(ports) + 2):
    process, status = os.wait()
    print(process, status, flush=True)
    if process in killed and not killed.remove(process) and not killed:
        begin(1, resumed_port, "training.checkpoint_every=2", "--resume")
"""


def test_ranks_die_or_stand_still(place):
    """Pairs without a launcher that would end the rest, all at once: a rank ends when the other one does, and only then; and a pair of
    which nothing is left goes on to the weights of the one that was left alone."""
    folder = place / "pairs"
    folder.mkdir()
    victims = [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1), (signal.SIGSTOP, 0)]
    ports = [free_port() for _ in range(7)]
    ids, seen, ended = [], [], {}
    with started(sys.executable, "-c", PAIRS, place / "run.yaml", folder, *ports) as process:

        def read():
            seen.append(process.stdout.readline())
            assert seen[-1], "".join(seen)
            words = seen[-1].split()
            if re.fullmatch(r"\d+( \d+)?\n", seen[-1]):
                ids.extend([int(words[0])] if len(words) == 1 else [])
                ended.update({int(words[0]): os.waitstatus_to_exitcode(int(words[1]))} if len(words) == 2 else {})

        while len(ids) < 12:
            read()
        wait_for_steps(folder / "1", 5)
        for rank in ids[2:4]:
            os.kill(rank, signal.SIGKILL)
        assert not (folder / "1/summary.json").exists()
        for pair, (kind, rank) in enumerate(victims, start=2):
            wait_for_steps(folder / str(pair), 3)
            os.kill(ids[2 * pair + rank], kind)
        hurt = {ids[2 * pair + rank] for pair, (_, rank) in enumerate(victims, start=2)}
        deadline = time.time() + 90
        while (len(ids) < 14 or set(ids) - hurt - set(ended)) and time.time() < deadline:
            read()
    logs = {file.stem: file.read_text() for file in sorted(folder.glob("*.log"))}
    assert [ended.get(id) for id in (*ids[:2], *ids[12:])] == [0] * 4, logs
    same_weights(folder / "0", folder / "1")
    for pair, (kind, rank) in enumerate(victims, start=2):
        other = 1 - rank
        assert ended.get(ids[2 * pair + other], 0) > 0, (kind, rank, logs)
        who = f"rank {rank}" if kind == signal.SIGSTOP else f"(rank {rank}|another rank)"
        name = r"error \(rank 1\)" if other else "error"
        assert re.search(f"^{name}: {who} has stopped, so", logs[f"{pair}.{other}"], re.MULTILINE), logs
        assert "Traceback" not in logs[f"{pair}.{other}"]


def test_the_deepspeed_example(place):
    output = run(
        "deepspeed", "--num_accelerators", 2, "--master_port", free_port(), "examples/deepspeed/finetune.py",
        "--model", GLASS, "--text", PROSE, "--steps", 6, "--max-tokens", 32, "--output", place / "example",
    )  # fmt: skip
    assert output.count("held-out loss") == 1, output
    summary = json.loads((place / "example/summary.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert AutoModelForCausalLM.from_pretrained(place / "example/model").config.model_type == "llama"


def test_the_demo_under_zero_3_with_offload(place):
    """SmolLM2-135M on two ranks, with the DeepSpeed file of the examples: a step of ES, one of backprop."""
    pattern = "schedule.schedule.pattern={es: 1, backprop: 1}"
    run(
        LAUNCH, "offload", "examples/spam/run.yaml", "schedule=zero3_alternate", pattern, f"output={place / 'demo'}",
        "schedule.estimators.es.population_size=4", "training.steps=2", "training.batch_size=2", "training.probe_rows=0",
        "training.evaluation_rows=4", "data.max_tokens=24", "data.validation=0.002",
    )  # fmt: skip
    assert [row["estimators"] for row in lines(place / "demo/metrics.jsonl")] == [["es"], ["backprop"]]
    model = AutoModelForCausalLM.from_pretrained(place / "demo/model")
    assert sum(p.numel() for p in model.parameters()) > 1.3e8
    assert len(load_file(place / "demo/model/model.safetensors")) > 200
