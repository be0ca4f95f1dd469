"""Studies with real runs in processes of their own: what is left behind, failing arms, going on, and stopping."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hybrid_opt import UserError, build, load_run
from hybrid_opt.config import load_study
from hybrid_opt.display.progress import Silence
from hybrid_opt.reports.writing import write_report
from hybrid_opt.studies.ablate import Ablation
from hybrid_opt.studies.arms import StudyPlan
from tests.conftest import PROSE, ROOT, run_document
from tests.training.test_objectives import REWARD

ES = {"type": "es", "population_size": 6, "sigma": 0.01, "learning_rate": 1e-4, "fitness_shaping": "none"}
BOTH = {"es": ES, "backprop": {"type": "backprop", "learning_rate": 1e-3}}
ALTERNATE = {"estimators": BOTH, "schedule": {"type": "alternate", "pattern": {"es": 1, "backprop": 1}}}
LM = {
    "data": {"train": str(PROSE), "validation": 0.02, "text": "text", "max_tokens": 32},
    "objective": {"type": "causal_lm"},
    "training": {"steps": 1, "batch_size": 2, "probe_rows": 0},
}
PATTERN = "schedule.schedule.pattern"


def write_study(folder, **study):
    base = run_document(folder / "out", schedule=ALTERNATE, **LM)
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    document = {
        "base": "base.yaml",
        "budgets": [{"steps": 2}],
        "seeds": [0],
        "threads": 1,
        "output": str(folder / "study"),
        **study,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return folder / "study.yaml"


def run_study(path, **options):
    said = []
    study = Ablation(StudyPlan(load_study(path), path), say=said.append, **options)
    complete = study.run()
    study.folder._file.close()
    return complete, said


def rows_of(folder, name="results.csv"):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def index_of(folder):
    return json.loads((folder / "study.json").read_text())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study with an arm that fails, one that gives up memory, and learning rates searched for; run twice."""
    folder = tmp_path_factory.mktemp("study")
    path = write_study(
        folder,
        axes={PATTERN: {"half": {"es": 1, "backprop": 1}}},
        arms={"fails": {"objective": {"type": "function", "function": "no_such_module:losses"}}},
        learning_rates={"type": "grid", "factors": [0.001, 1.0]},
        reference="half",
        processes=2,
    )
    first, again = run_study(path, allow_code=True), run_study(path, allow_code=True)
    return folder / "study", first, again


def test_a_study_leaves_a_row_for_each_run_and_arm(study):
    folder, (complete, _), _ = study
    assert complete
    (row,) = rows_of(folder)
    summary = json.loads((folder / "runs/base/2-steps/half/seed-0/summary.json").read_text())
    assert (row["task"], row["budget"], row["arm"], row["seed"]) == ("base", "2 steps", "half", "0")
    assert float(row["loss"]) == summary["after"]["loss"] < float(row["loss_before"])
    assert (row["steps"], row["forwards"], row["backwards"]) == ("2", "7", "1")
    assert float(row["forward_equivalents"]) == 6 + 3
    assert int(row["peak_memory_bytes"]) == summary["peak_memory_bytes"]
    half, fails = rows_of(folder, "summary.csv")
    assert (half["seeds"], half["failed"], half["loss"], half["loss_low"]) == ("1", "0", row["loss"], "")
    assert (fails["seeds"], fails["failed"], fails["loss"]) == ("0", "1", "")


def test_the_grids_best_factor_is_used(study):
    folder, _, _ = study
    (row,) = rows_of(folder)
    losses = {
        factor: json.loads((folder / f"search/base/2-steps/half/x{factor}/summary.json").read_text())["after"]["loss"]
        for factor in ("0.001", "1")
    }
    assert losses["1"] < losses["0.001"]
    assert float(row["learning_rate_factor"]) == 1.0
    searched = yaml.safe_load((folder / "search/base/2-steps/half/x0.001/run.yaml").read_text())
    assert searched["training"]["seed"] == 1  # none of the study's own
    assert searched["schedule"]["estimators"]["backprop"]["learning_rate"] == pytest.approx(1e-6)


def test_a_failing_arm_is_reported_and_does_not_stop_the_rest(study):
    folder, (_, said), _ = study
    runs = {run["arm"]: run for run in index_of(folder)["runs"]}
    assert runs["half"]["status"] == "finished"
    assert runs["fails"]["status"] == "failed"
    assert "cannot import 'no_such_module'" in runs["fails"]["error"]  # what is allowed is allowed in its process too
    assert runs["fails"]["error"].startswith("failed with all learning rates: ")
    assert any("fails: failed: " in line and "no_such_module" in line for line in said)


def test_a_second_time_nothing_that_finished_is_repeated(study):
    folder, (_, first), (complete, again) = study
    assert complete
    assert [line.split(":")[0] for line in again] == [line.split(":")[0] for line in first if "fails" in line]
    assert not (folder / "runs/base/2-steps/half/seed-0/model").exists()


def test_finished_runs_with_other_settings_are_not_mixed_in(study):
    folder, _, _ = study
    path = write_study(
        folder.parent, changes={"training.batch_size": 3}, axes={PATTERN: {"half": {"es": 1, "backprop": 1}}}
    )
    with pytest.raises(
        UserError, match=r"training.batch_size was 2, and the study now says 3; give the study another output"
    ):
        run_study(path)


def test_memory_is_fitted_by_the_first_rung_that_suffices(tmp_path):
    """Nothing fits into 1 MB, and everything into 100 GB; between, the trial's own peak decides."""
    path = write_study(
        tmp_path,
        budgets=[{"steps": 1, "peak_memory": "1MB"}, {"steps": 1, "peak_memory": "100GB"}],
        fit=[{"training.batch_size": 1}],
        processes=2,
    )
    complete, _ = run_study(path)
    assert complete
    runs = {run["budget"]: run for run in index_of(tmp_path / "study")["runs"]}
    assert runs["1 steps in 100 GB"]["status"] == "finished"
    failed = runs["1 steps in 0.001 GB"]
    peaks = [
        json.loads((tmp_path / f"study/fit/base/1-steps-in-0.001-GB/base/rung-{i}/summary.json").read_text())[
            "peak_memory_bytes"
        ]
        for i in (0, 1)
    ]
    assert failed["error"] == f"does not fit into 0.001 GB: needs {min(peaks) / 1e9:.3g} GB at the least"
    (row,) = rows_of(tmp_path / "study")
    assert row["fitted"] == ""


def test_a_study_of_a_reward_is_compared_by_it(tmp_path):
    path = write_study(tmp_path, baselines=["lora"], reference="lora", processes=2)
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    rewards = {**REWARD["objective"], "rewards": [{"function": "exact_match"}]}
    base |= {**REWARD, "objective": rewards, "training": {**REWARD["training"], "probe_rows": 0}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    complete, said = run_study(path)
    assert complete
    index, rows = index_of(tmp_path / "study"), rows_of(tmp_path / "study")
    assert [run["status"] for run in index["runs"]] == ["finished"] * 2
    assert index["metric"] is None  # one function's mean is the reward
    assert [row["arm"] for row in rows] == ["base", "lora"]
    assert all(float(row["reward"]) == -float(row["loss"]) for row in rows)
    assert all("loss" not in line for line in said)
    document = json.loads(write_report(tmp_path / "study", "json").read_text())
    (arms,) = document["sections"][0]["tables"]
    assert [column["title"] for column in arms["columns"]][2:4] == ["reward", "reward against lora"]


def ablate(path, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "hybrid_opt", "ablate", str(path), *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(pattern, folder, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := sorted(folder.glob(pattern))):
        assert time.monotonic() < deadline, f"{pattern} did not come"
        time.sleep(0.05)
    return found


def trainer_of(process):
    """The process that an ablation has started."""
    tasks = Path(f"/proc/{process.pid}/task")
    (child,) = {int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()}
    return child


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_a_killed_and_a_stopped_run_go_on_to_the_same_result(tmp_path):
    path = write_study(tmp_path, budgets=[{"steps": 80}], checkpoint_every=5)
    run = tmp_path / "study/runs/base/80-steps/base/seed-0"

    process = ablate(path)
    wait_for("checkpoints/step-0000001*", run)
    with pytest.raises(UserError, match="is in use: another hybrid-opt ablate"):
        run_study(path)
    os.kill(trainer_of(process), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert "base, 80 steps, base, seed 0: failed: ended by SIGKILL (out of memory?)" in output
    assert [run["status"] for run in index_of(tmp_path / "study")["runs"]] == ["failed"]

    process = ablate(path)
    wait_for("checkpoints/step-0000003*", run)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "base, 80 steps, base, seed 0: interrupted; the same command goes on with it" in output
    assert [run["status"] for run in index_of(tmp_path / "study")["runs"]] == ["interrupted"]

    complete, _ = run_study(path)
    assert complete
    assert [json.loads(row)["step"] for row in (run / "metrics.jsonl").read_text().splitlines()] == list(range(80))
    (row,) = rows_of(tmp_path / "study")
    whole = build(
        load_run(f"{run}.yaml", [f"output={tmp_path / 'whole'}", "training.checkpoint_every=0"]), display=Silence()
    )
    assert whole.train().after["loss"] == float(row["loss"])


@pytest.mark.parametrize(
    ("put", "words"),
    [
        (lambda folder: (folder / "study").write_text("a file"), "cannot be written to"),
        (lambda folder: [(folder / "study").mkdir(), (folder / "study/letters.txt").write_text("dear")], "other things than a study (letters.txt)"),
    ],
)  # fmt: skip
def test_folders_that_are_not_a_studys(tmp_path, put, words):
    path = write_study(tmp_path)
    put(tmp_path)
    with pytest.raises(UserError) as error:
        run_study(path)
    assert words in str(error.value)


def test_the_command_line_lists_arms_without_running_them(tmp_path):
    path = write_study(
        tmp_path, axes={PATTERN: {"half": {"es": 1, "backprop": 1}}}, baselines=["lora"], seeds=[0, 1, 2]
    )
    process = ablate(path, "--dry-run", "budgets=[{seconds: 1800}]")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "schedule.schedule.pattern: {es: 1, backprop: 1}" in output
    assert "6 runs: 2 arms, tasks base, budgets 1800 seconds, seeds [0, 1, 2]; 3.0 hours of steps" in output
    assert not (tmp_path / "study").exists()
