"""Names in configurations do not lead out of the output folder, and those that no file can have are refused."""

import json
import os
from pathlib import Path

import pytest

from hybrid_opt import UserError
from hybrid_opt.config import load_schedule, load_study
from hybrid_opt.run_files.run_folder import RunFolder, remove_entries
from hybrid_opt.studies.arms import StudyPlan, slug
from hybrid_opt.studies.study_folder import StudyFolder
from tests.conftest import run_document
from tests.test_bad_inputs import exit_code

NAMES = [
    "../../x",
    "..",
    "/etc/x",
    "a/b",
    "a\\b",
    "~",
    ".hidden",
    "x" * 400,
    "é" * 200,
    "🙂" * 100,
    "con: {a: b}",
    "-rf",
    " ",
]


def test_names_of_arms_and_tasks_stay_in_the_studys_folder(tmp_path):
    run = run_document(tmp_path / "out")
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    document = {"base": "run.yaml", "budgets": [{"steps": 1}], "seeds": [0], "output": str(tmp_path / "study")}
    for number, name in enumerate(NAMES):
        study = document | {"tasks": {name: {}}, "arms": {name: {}}}
        (tmp_path / f"{number}.yaml").write_text(json.dumps(study, ensure_ascii=False))
        plan = StudyPlan(load_study(tmp_path / f"{number}.yaml"), tmp_path / f"{number}.yaml")
        (cell,) = plan.cells
        folder = StudyFolder(plan.study.output).runs / cell.place / "seed-0"
        assert Path(os.path.normpath(folder)).is_relative_to(tmp_path / "study/runs")
        assert len(folder.relative_to(tmp_path / "study/runs").parts) == 4  # task, budget, arm, seed
        folder.mkdir(parents=True, exist_ok=True)  # "../../x" and "a/b" of two studies may be alike
        (folder / "metrics.jsonl").write_text("")


def test_long_names_stay_different():
    one, other = slug("x" * 400 + "a"), slug("x" * 400 + "b")
    assert one != other
    assert [len(name) for name in (one, other)] == [159, 159]
    assert len(slug("é" * 200).encode()) == 159
    assert slug("pattern es: 1") == "pattern-es-1"


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "x" * 300 + "/b", "/".join(["x" * 200] * 30), "a\0b"])
def test_an_output_that_no_folder_can_be_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"^output: .* cannot be written to: (File name too long|embedded null byte)"):
        RunFolder(tmp_path / name).check()


def test_an_unknown_users_home_is_a_name_like_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunFolder("~nobody-of-this-name/out").check()
    assert StudyFolder("~nobody-of-this-name/out").path == Path("~nobody-of-this-name/out")


def test_what_a_link_leads_to_is_not_removed(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/kept").write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/checkpoints").symlink_to(tmp_path / "theirs")
    remove_entries(tmp_path / "out", ["checkpoints"])
    assert list((tmp_path / "out").iterdir()) == []
    assert (tmp_path / "theirs/kept").exists()


@pytest.mark.parametrize("name", ["", "a\tb", "a\nb", "a\x1b[2J", "x" * 101, "\u202e"])
def test_names_of_estimators_are_plain(name):
    es = {"type": "es", "population_size": 6, "sigma": 1e-3, "learning_rate": 1e-5}
    with pytest.raises(UserError, match=r"is no name for an estimator; write 1 to 100 characters"):
        load_schedule({"estimators": {name: es}, "schedule": {"type": "single", "estimator": name}})


def test_a_plan_of_endless_steps_is_refused(tmp_path, monkeypatch, capsys):
    run = run_document(tmp_path / "out", model={"name": "smollm2-135m"}, training={"steps": 2**62})
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    assert exit_code(monkeypatch, "plan", str(tmp_path / "run.yaml")) == 2
    assert "training.steps: 4,611,686,018,427,387,904 steps are too many" in capsys.readouterr().err
    assert exit_code(monkeypatch, "plan", str(tmp_path / "run.yaml"), "--steps", "3") == 0
