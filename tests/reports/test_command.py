"""`hybrid-opt report` on a real run, and beside `hybrid-opt train`."""

import json

import pytest
from typer.testing import CliRunner

from hybrid_opt import cli
from hybrid_opt.config import load_run
from hybrid_opt.display.progress import Silence
from hybrid_opt.reports.writing import read_report
from hybrid_opt.training.build import build


@pytest.fixture
def finished(write_run):
    path = write_run()
    build(load_run(path), display=Silence()).train()
    return path


def test_a_real_run(finished, tmp_path):
    runner, output = CliRunner(), tmp_path / "out"
    for kind in ("html", "md", "json", "png"):
        answer = runner.invoke(cli.app, ["report", str(output), "--format", kind])
        assert (answer.exit_code, answer.stdout) == (0, f"{output / f'report.{kind}'}\n")
    document = json.loads((output / "report.json").read_text())
    summary = json.loads((output / "summary.json").read_text())
    assert document["sections"][0]["tables"][1]["rows"][0] == {
        "measure": "loss",
        "before": summary["before"]["loss"],
        "after": summary["after"]["loss"],
    }
    names = [section.name for section in read_report(output).sections]
    assert names == ["outcome", "loss", "who_acted", "update_norms", "es_statistics", "memory", "what_was_run"]
    build(load_run(finished), overwrite=True, display=Silence()).train()
    assert not list(output.glob("report.*"))


def test_output_elsewhere(finished, tmp_path):
    place = tmp_path / "elsewhere.html"
    CliRunner().invoke(cli.app, ["report", str(tmp_path / "out"), "--output", str(place)], catch_exceptions=False)
    assert place.read_text().startswith("<!DOCTYPE html>")
    assert not list((tmp_path / "out").glob("report.*"))
