"""Folders that are whole, under way, old or damaged."""

import json

import pytest

from hybrid_opt.errors import UserError
from hybrid_opt.reports.reading import read_folder
from hybrid_opt.reports.writing import read_report, write_report
from tests.reports.folders import age, jsonl, write_run, write_study


def section(report, name):
    return next(section for section in report.sections if section.name == name)


def panels(report, name):
    return [panel for group in section(report, name).groups for panel in group.panels]


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder; give the folder that `train` or `ablate` wrote"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is a file; give the folder"):
        read_folder(tmp_path / "file")


def test_a_folder_without_run_and_study_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        UserError, match=r"none of metrics.jsonl, summary.json, run.yaml\) nor a study \(it has no study.json"
    ):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"step": 3, "los', "not JSON"),
        ("[1, 2]", "expected keys and values"),
        ('{"step": 3}', "no key 'weights'"),
    ],
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line, problem):
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = line
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"metrics.jsonl: line 4: {problem}.*; mend or delete the line"):
        read_folder(run)


def test_damaged_json_is_named(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "summary.json").write_text('{"steps": 3,\n "before" }')
    with pytest.raises(UserError, match=r"summary.json: line 2: not JSON"):
        read_folder(run)
    study = write_study(tmp_path / "study", seeds=(0,), steps=4)
    (study / "summary.csv").write_text("task,arm\nspam,es\n")
    with pytest.raises(UserError, match=r"summary.csv: line 1: no column 'budget'"):
        read_folder(study)
    (study / "study.json").write_text('{"tasks": []}')
    with pytest.raises(UserError, match=r"study.json: no list 'budgets'"):
        read_folder(study)


def test_a_run_under_way(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "estim')
    report = read_report(run)
    assert dict(report.facts)["status"] == "under way or interrupted"
    assert dict(report.facts)["steps"] == "16"
    assert dict(report.facts)["loss"] == "1.6000 \u2192 0.5333"
    assert any("half written" in remark for remark in report.remarks)
    es, backprop = section(report, "outcome").tables[0].rows
    assert (es["steps"], es["forwards"], es["loss_decrease"]) == (12, 96, None)
    assert (backprop["steps"], backprop["backwards"]) == (8, 8)


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "run.yaml").write_text("training: {steps: 3}\n")
    for kind in ("html", "md", "json", "png"):
        assert write_report(tmp_path, kind).stat().st_size
    assert "No step has been recorded yet." in (tmp_path / "report.html").read_text()


def test_a_run_of_an_older_version_says_what_it_lacks(tmp_path):
    run = write_run(tmp_path / "run")
    age(run)
    report = read_report(run)
    assert [panel.name for panel in panels(report, "loss")] == ["loss_steps", "loss_seconds", "loss_tokens"]
    assert "machine.json is missing" in report.remarks[0]
    assert "no forward-equivalents, update norms and statistics" in report.remarks[1]
    assert "No update norms were recorded" in section(report, "update_norms").texts[0]
    assert len(section(report, "es_statistics").texts) == 2
    assert "cannot fall" in section(report, "memory").groups[0].caption
    write_report(run)


@pytest.mark.parametrize("lines", [None, []])
def test_a_run_without_evaluations(tmp_path, lines):
    run = write_run(tmp_path / "run")
    (run / "evaluations.jsonl").unlink() if lines is None else jsonl(run / "evaluations.jsonl", lines)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "before": {}, "after": {}}))
    report = read_report(run)
    assert "there were no evaluations" in section(report, "loss").groups[0].caption
    assert [table.name for table in section(report, "outcome").tables] == ["estimators"]
    write_report(run)


def test_losses_that_nobody_measured_or_that_are_not_finite(tmp_path):
    run = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[0]["loss"], rows[1]["loss"] = None, float("nan")
    jsonl(run / "metrics.jsonl", rows)
    es = panels(read_report(run), "loss")[0].series[0]
    assert es.x == (5, 6, 9, 10, 13, 14)
    assert "NaN" not in write_report(run, "json").read_text()


def test_a_study_under_way(tmp_path):
    def status(arm, seed):
        return "waiting" if seed else "interrupted" if arm == "blend" else "finished"

    study = write_study(tmp_path / "study", status=status)
    (study / "summary.csv").unlink()
    report = read_report(study)
    assert dict(report.facts)["runs"] == "3 finished, 8 waiting, 1 interrupted"
    rows = section(report, "arms").tables[0].rows
    assert [row["runs"] for row in rows] == ["1 (2 waiting)"] * 2 + ["0 (1 interrupted, 2 waiting)", "1 (2 waiting)"]
    assert not any("loss" in row for row in rows)
    assert len(panels(report, "loss")[0].series) == 4
    assert all(line.low is None for line in panels(report, "loss")[0].series)


def test_a_study_in_which_all_failed(tmp_path):
    study = write_study(tmp_path / "study", seeds=(0, 1), status=lambda arm, seed: "failed")
    report = read_report(study)
    notes = section(report, "arms").tables[0].notes
    assert len(notes) == 8
    assert notes[0] == "backprop, seed 0, failed: MemoryError: out of memory <b>now</b>"
    for kind in ("html", "md", "json", "png"):
        assert write_report(study, kind).stat().st_size


def test_a_study_that_has_not_begun(tmp_path):
    study = write_study(tmp_path / "study", status=lambda arm, seed: "waiting")
    assert "No finished run yet." in write_report(study).read_text()


def test_an_output_that_cannot_be_written(tmp_path):
    run = write_run(tmp_path / "run", steps=4)
    with pytest.raises(UserError, match="cannot be written: No such file or directory; make its folder first"):
        write_report(run, "json", tmp_path / "none" / "report.json")
