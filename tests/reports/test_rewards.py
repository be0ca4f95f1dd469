"""Reports on runs and studies with a reward: nowhere its negative, and never in one curve with another loss."""

import csv
import json

import pytest

from hybrid_opt.reports.reading import read_run, read_study
from hybrid_opt.reports.writing import write_report
from tests.reports.folders import reward, write_run, write_study
from tests.reports.test_html import parsed
from tests.reports.test_numbers import panel, section


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("studies") / "one", steps=8, change=reward)
    with (folder / "summary.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    return json.loads(write_report(folder, "json").read_text()), rows, folder


def test_a_run_shows_the_reward_and_what_backprop_minimises_apart(tmp_path):
    folder = reward(write_run(tmp_path / "run", 8))
    document = json.loads(write_report(folder, "json").read_text())
    assert section(document, "loss")["title"] == "Reward along the way"
    drawn = panel(document, "reward_steps")
    assert drawn["y"] == "reward (higher is better)"
    values = {line["label"]: (line["x"], line["y"]) for line in drawn["series"]}
    assert values["es"] == ([1, 2, 5, 6], [0.25] * 4)
    assert values["es + backprop"] == ([4, 8], [0.25] * 2)
    assert values["evaluation"] == ([0, 4, 8], [1 - 0.3 * 1.6 / (1 + done / 8) for done in (0, 4, 8)])
    assert "backprop" not in values
    losses = [json.loads(line)["losses"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = panel(document, "own_0")
    assert (own["title"], own["y"]) == ("backprop: its own loss", "loss")
    assert own["series"][0]["x"] == [3, 4, 7, 8]
    assert own["series"][0]["y"] == [losses[number - 1]["backprop"] for number in (3, 4, 7, 8)]
    assert dict(document["facts"])["reward"] == "0.5200 \u2192 0.7600"
    assert "loss" not in dict(document["facts"])
    assert panel(document, "completion_tokens")["series"][0]["y"] == [7.5] * 6
    assert section(document, "completions")["texts"] == ["No reward went wrong in training."]
    with pytest.raises(StopIteration):
        panel(document, "reward_errors")
    assert "es: 12 pairs tied." in section(document, "outcome")["tables"][0]["notes"]


def test_a_run_without_rewards_has_no_section_on_completions(tmp_path):
    document = json.loads(write_report(write_run(tmp_path / "run", 4), "json").read_text())
    assert "completions" not in [part["name"] for part in document["sections"]]
    assert section(document, "loss")["title"] == "Loss along the way"
    assert len(section(document, "loss")["groups"]) == 1


def test_a_run_under_way_knows_its_reward_from_its_first_line(tmp_path):
    folder = reward(write_run(tmp_path / "run", 3, lambda number: ("backprop",)))
    (folder / "summary.json").unlink()
    run = read_run(folder)
    assert run.goal == "reward"
    document = json.loads(write_report(folder, "json").read_text())
    assert [line["label"] for line in panel(document, "reward_steps")["series"]] == ["evaluation"]


def test_a_statistic_that_nobody_knows_is_drawn_under_its_name(tmp_path):
    folder = write_run(tmp_path / "run", 4)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["parts"].get("es", {"statistics": {}})["statistics"] |= {
            "novel_thing": -1.5,
            "words": "none",
            "nothing": None,
        }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = json.loads(write_report(folder, "json").read_text())
    assert panel(document, "novel_thing")["series"][0]["y"] == [-1.5] * 3
    assert panel(document, "novel_thing")["title"] == "novel thing"
    with pytest.raises(StopIteration):
        panel(document, "words")


def test_arms_are_compared_by_the_reward(study):
    document, summary, folder = study
    table = section(document, "arms")["tables"][0]
    keys = [column["key"] for column in table["columns"]]
    assert keys[2:4] == ["reward", "reward_difference"]
    assert "loss" not in keys
    rows = {row["arm"]: row for row in table["rows"]}
    for arm, row in rows.items():
        assert row["reward"]["mean"] == float(summary[arm]["reward"]) == -float(summary[arm]["loss"])
    assert float(summary["es 0.5"]["reward_difference"]) < 0
    line = next(line for line in write_report(folder, "md").read_text().splitlines() if "2. es 0.5" in line)
    assert line.count("worse") == 2  # the reward and the metric
    assert "es 0.5: 3 of 24 steps skipped, as all members were equally good or too many not finite." in table["notes"]
    assert section(document, "pareto")["title"] == "Reward against cost"


def test_the_front_of_a_reward_rises_with_what_is_paid(study):
    document, summary, _ = study
    front, *points = panel(document, "pareto_g0_memory")["series"]
    assert (front["x"], front["y"]) == ([1000, 3000], sorted(front["y"]))
    assert front["y"][0] < front["y"][1]
    assert [p["form"] == "solid" for p in points] == [row["pareto_memory"] == "True" for row in summary.values()]
    assert panel(document, "loss_g0_steps")["y"] == "evaluation reward (higher is better)"


def test_a_study_under_way_and_a_mixed_one(tmp_path):
    waiting = write_study(
        tmp_path / "waiting", seeds=(0,), steps=4, change=reward, status=lambda arm, seed: "interrupted"
    )
    assert read_study(waiting).goal_of("spam", "60 seconds") == "reward"
    number = iter(range(8))
    mixed = write_study(
        tmp_path / "mixed", seeds=(0,), steps=4, change=lambda run: reward(run) if next(number) % 2 else run
    )
    assert read_study(mixed).goal_of("spam", "60 seconds") == "loss"
    parsed(write_report(mixed).read_text())


def test_the_pages_are_well_formed(study, tmp_path):
    for folder in (study[2], reward(write_run(tmp_path / "run", 8))):
        parsed(write_report(folder).read_text())
