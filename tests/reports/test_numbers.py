"""The numbers in tables and JSON are those of the files."""

import csv
import json
import math

import numpy as np
import pytest

from hybrid_opt.reports.ablation_table import verdict
from hybrid_opt.reports.content import Key
from hybrid_opt.reports.mean_curves import mean_curve
from hybrid_opt.reports.placing import around_points, beside_ends
from hybrid_opt.reports.thinning import thinned
from hybrid_opt.reports.update_norms import in_depth_order
from hybrid_opt.reports.wording import short, with_interval
from hybrid_opt.reports.writing import write_report
from tests.reports.folders import LAYERS, turns, write_run, write_study


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "one")
    return json.loads(write_report(folder, "json").read_text())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = write_study(
        tmp_path_factory.mktemp("studies") / "one",
        status=lambda arm, seed: "failed" if (arm, seed) == ("blend", 1) else "finished",
    )
    with (folder / "summary.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    return json.loads(write_report(folder, "json").read_text()), rows, folder


def section(document, name):
    return next(section for section in document["sections"] if section["name"] == name)


def panel(document, name):
    groups = (group for section in document["sections"] for group in section["groups"])
    return next(panel for group in groups for panel in group["panels"] if panel["name"] == name)


def test_what_each_estimator_took(run):
    es, backprop, both = section(run, "outcome")["tables"][0]["rows"]
    costs = {"steps": 12, "forwards": 96, "backwards": 0, "forward_equivalents": 96, "tokens": 9600, "seconds": 24}
    assert es == {"estimator": "es", **costs, "loss_decrease": 0.71}
    costs = {"steps": 8, "forwards": 8, "backwards": 8, "forward_equivalents": 24, "tokens": 800, "seconds": 8}
    assert backprop == {"estimator": "backprop", **costs, "loss_decrease": 0.85}
    assert both == {"estimator": "es + backprop, together", "loss_decrease": 0.1}


def test_losses_against_four_axes(run):
    ends = {"steps": 16, "seconds": 32, "tokens": 10400, "forward_equivalents": 120}
    for axis, end in ends.items():
        evaluation = panel(run, f"loss_{axis}")["series"][-1]
        assert evaluation["label"] == "evaluation"
        assert (evaluation["x"][0], evaluation["x"][-1]) == (0, end)
        assert evaluation["y"] == [1.6 / (1 + done / 8) for done in (0, 4, 8, 12, 16)]
    training = panel(run, "loss_steps")["series"]
    assert {line["label"]: line["x"] for line in training[:3]} == {
        "es": [1, 2, 5, 6, 9, 10, 13, 14],
        "backprop": [3, 7, 11, 15],
        "es + backprop": [4, 8, 12, 16],
    }


def test_who_acted(run):
    es, backprop = panel(run, "timeline")["lanes"]
    assert es["edges"] == [0, 2, 3, 6, 7, 10, 11, 14, 15, 16]
    assert es["weights"] == [1, 0] * 4 + [1]
    assert backprop["weights"] == [0, 1] * 4


def test_update_norms_are_roots_of_mean_squares(run):
    norms = panel(run, "update_norms")
    assert norms["categories"] == list(LAYERS)
    assert [line["label"] for line in norms["series"]] == ["es", "backprop", "es + backprop"]
    for line, scale in zip(norms["series"], (1e-3, 1e-2, 2e-2), strict=True):
        assert line["x"] == pytest.approx([scale * (1 + i) for i in range(6)])
        assert line["y"] == [0, 1, 2, 3, 4, 5]


def test_es_statistics(run):
    snr = panel(run, "snr")["series"][0]
    acting = [number for number in range(16) if "es" in turns(number)]
    assert snr["x"] == [number + 1 for number in acting]
    assert snr["y"] == [3 + math.sin(number) for number in acting]
    assert panel(run, "rho2")["series"][0]["x"] == [4, 8, 12, 16]
    assert section(run, "es_statistics")["texts"] == []


def test_memory(run):
    peaks = {line["label"]: set(line["y"]) for line in panel(run, "memory")["series"]}
    assert peaks == {"es": {1000}, "backprop": {3000}, "es + backprop": {3000}}


def test_provenance(run):
    rows = {row["what"]: row["value"] for row in section(run, "what_was_run")["tables"][0]["rows"]}
    assert rows["packages"] == "torch 2.13.0+cpu, transformers 5.23.0"
    assert (rows["memory"], rows["cores"]) == ("16.0 GB", "2")
    assert "smollm2-135m" in section(run, "what_was_run")["code"]


def test_the_ablation_table_is_the_summary(study):
    document, summary, _ = study
    rows = {row["arm"]: row for row in section(document, "arms")["tables"][0]["rows"]}
    assert list(rows) == ["backprop", "es 0.5", "blend", "alternate"]
    for arm, row in rows.items():
        expected = {
            end: summary[arm][f"loss{side}"] for end, side in (("mean", ""), ("low", "_low"), ("high", "_high"))
        }
        assert row["loss"] == {end: float(value) for end, value in expected.items()}
        for cost in ("steps", "seconds", "forwards", "backwards", "forward_equivalents", "tokens", "peak_memory_bytes"):
            assert row[cost] == float(summary[arm][cost])
    assert "loss_difference" not in rows["backprop"]
    assert rows["es 0.5"]["metric_difference"]["mean"] == float(summary["es 0.5"]["metric_difference"])
    assert rows["blend"]["runs"] == "2 (1 failed)"


def test_what_is_not_told_apart_is_said(study):
    document, summary, folder = study
    notes = section(document, "arms")["tables"][0]["notes"]
    undecided = [
        arm
        for arm, row in summary.items()
        if row["loss_difference_low"] and float(row["loss_difference_low"]) <= 0 <= float(row["loss_difference_high"])
    ]
    assert undecided == ["blend"]
    assert "Not told apart from the reference backprop in loss, as the interval includes 0: blend." in notes
    assert "blend, seed 1, failed: MemoryError: out of memory <b>now</b>" in notes
    markdown = write_report(folder, "md").read_text()
    assert markdown.index("| arm |") < markdown.index("Does ES pay?")
    assert "+0.08 ± 0.17, not told apart" in markdown
    assert (folder / "report.png").exists()


def test_curves_of_seeds_evaluated_at_the_same_steps_are_averaged_there(study):
    document, summary, _ = study
    curve = panel(document, "loss_g0_steps")["series"][1]
    assert curve["x"] == [0, 4, 8, 12, 16]
    for end, side in (("y", "loss"), ("low", "loss_low"), ("high", "loss_high")):
        assert curve[end][-1] == pytest.approx(float(summary["es 0.5"][side]))


def test_the_front(study):
    front, *points = panel(study[0], "pareto_g0_memory")["series"]
    assert front["x"] == [1000, 3000]
    assert [point["form"] for point in points] == ["solid", "solid", "hollow", "hollow"]


def test_one_seed_has_no_interval(tmp_path):
    study = write_study(tmp_path / "study", seeds=(0,), steps=4)
    document = json.loads(write_report(study, "json").read_text())
    table = section(document, "arms")["tables"][0]
    assert table["rows"][1]["loss"]["low"] is None
    assert table["notes"] == ["One seed: there are no intervals, and differences may be chance."]
    assert panel(document, "loss_g0_steps")["series"][0]["low"] is None
    assert verdict(table["rows"][1]["loss_difference"], "lower") == "one seed"


def test_seeds_evaluated_elsewhere_are_interpolated_where_all_have_been():
    curve = mean_curve(Key("a", "ink"), [((0.0, 10.0), (2.0, 1.0)), ((1.0, 8.0), (2.0, 1.0))])
    assert (curve.x[0], curve.x[-1], len(curve.x)) == (1.0, 8.0, 60)
    assert curve.y[0] == pytest.approx((1.9 + 2.0) / 2)
    assert mean_curve(Key("a", "ink"), [((0.0, 1.0), (2.0, 1.0)), ((5.0, 8.0), (2.0, 1.0))]) is None


@pytest.mark.parametrize(
    ("low", "high", "better", "word"),
    [
        (-2, -1, "lower", "better"),
        (-2, -1, "higher", "worse"),
        (-1, 2, "lower", "not told apart"),
        (1, 2, "higher", "better"),
    ],
)
def test_verdicts(low, high, better, word):
    assert verdict({"mean": (low + high) / 2, "low": low, "high": high}, better) == word


def test_bins_keep_mean_least_and_most():
    line = thinned(Key("a", "ink"), range(6), [1.0, 3.0, None, 5.0, 5.0, 8.0], 2)
    assert (line.x, line.y) == ((0.5, 3.5, 5.0), (2.0, 5.0, 8.0))
    assert (line.low, line.high, line.form) == ((1.0, 5.0, 8.0), (3.0, 5.0, 8.0), "faint")


def test_layers_are_in_order_of_depth():
    assert in_depth_order(["norm", "10", "2", "lm_head", "embed_tokens"]) == [
        "embed_tokens",
        "2",
        "10",
        "lm_head",
        "norm",
    ]


def test_numbers_beside_points_do_not_hide_each_other():
    ends = [(100.0, 50.0 + i) for i in range(12)]
    heights = [y + dy for (_, y), (_, dy) in zip(ends, beside_ends(ends, 150.0), strict=True)]
    assert np.diff(heights) == pytest.approx(10.0)
    assert min(heights) >= 0
    assert max(heights) <= 150
    dx, dy = np.transpose(around_points([(50.0, 50.0)] * 8, 100.0, 100.0))
    assert len(set(zip(dx.round(6), dy.round(6), strict=True))) == 8


def test_words_for_numbers():
    assert with_interval(0.34296, 0.31, 0.376) == "0.343 ± 0.033"
    assert with_interval(0.34296, None, None) == "0.3430"
    assert [short(value) for value in (0.0004, 2500, 15000, 2.5e6)] == ["0.0004", "2,500", "15k", "2.5M"]


def test_ten_thousand_steps_make_a_moderate_page(tmp_path):
    document = write_report(write_run(tmp_path / "run", 10_000, evaluate_every=500))
    assert document.stat().st_size < 500_000
    assert "Each line joins means of 42 steps; the band reaches from least to most." in document.read_text()
