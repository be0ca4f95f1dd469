"""A real run with a reward that fails, ties and has several functions, and all that shows it."""

import copy
import io
import json

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybrid_opt import build, load_run
from hybrid_opt.display.dashboard import Dashboard
from hybrid_opt.planning.checking import objective_lines
from hybrid_opt.reports.writing import write_report
from tests.conftest import run_document
from tests.training.test_objectives import REWARD

STEPS = 6


def fails_for_some(completions, question):
    """Late sums cannot be judged; a call for a single completion says which."""
    if any(text.startswith("9") for text in question):
        raise ValueError("nine")
    return [0.5] * len(completions)


def document(output, **objective):
    run = copy.deepcopy(REWARD)
    run["objective"]["rewards"] = [{"function": f"{__name__}:fails_for_some"}, {"function": "exact_match"}]
    run["objective"] |= objective
    run["training"] |= {"steps": STEPS, "batch_size": 10, "evaluate_every": 3}
    return run_document(output, **run, report_to="tensorboard")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The run's folder, and what stood on a terminal."""
    folder = tmp_path_factory.mktemp("shown")
    path = folder / "run.yaml"
    path.write_text(json.dumps(document(folder / "out")))
    console = Console(record=True, width=110, height=30, force_terminal=True, file=io.StringIO())
    with pytest.warns(RuntimeWarning, match="fails_for_some: raised ValueError: nine"):
        build(load_run(path), allow_code=True, display=Dashboard(console)).train()
    return folder / "out", console.file.getvalue()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def statistics(folder):
    return [row["parts"]["es"]["statistics"] for row in lines(folder / "metrics.jsonl") if "es" in row["parts"]]


def test_what_goes_wrong_is_counted(shown):
    folder, _ = shown
    rows, own = lines(folder / "metrics.jsonl"), statistics(folder)
    assert [row["parts"].get("backprop", {}).get("own_objective") for row in rows] == [True, None] * (STEPS // 2)
    assert [row["reward"] for row in rows[1::2]] == [-row["loss"] for row in rows[1::2]]
    assert [row["reward"] for row in rows[::2]] == [None] * (STEPS // 2)
    assert [s["reward"] for s in own] == [row["reward"] for row in rows[1::2]]
    assert sum(s["reward_errors"] for s in own) > 0
    assert [s["skipped"] for s in own] == [int(row["loss_spread"] == 0) for row in rows[1::2]]
    assert [s["skipped"] for s in own] == [int(sum(row["update_norms"]["es"].values()) == 0) for row in rows[1::2]]
    assert sum(s["skipped"] for s in own) > 0
    summary = json.loads((folder / "summary.json").read_text())
    counts = {name: sum(s[name] for s in own) for name in ("skipped", "tied_pairs", "reward_errors")}
    assert summary["estimators"]["es"]["counts"] == counts
    assert summary["goal"] == "reward"


def test_the_dashboard_stood_to_the_end(shown):
    folder, terminal = shown
    errors = int(sum(s["reward_errors"] for s in statistics(folder)))
    last = terminal[terminal.rindex("estimator") :]
    assert "errors" in last
    assert f"{errors:,}" in last
    assert "validation" in terminal
    assert "loss -" not in terminal


def test_trackers_get_every_statistic(shown):
    folder, _ = shown
    events = EventAccumulator(str(folder / "logs")).Reload()
    for name in ("reward", "skipped", "tied_pairs", "reward_errors", "completion_tokens", "finished", "exact_match"):
        values = [event.value for event in events.Scalars(f"train/es/{name}")]
        assert values == pytest.approx([s[name] for s in statistics(folder)])
    assert [event.step for event in events.Scalars("train/reward")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("train/backprop/loss")] == [1, 3, 5]
    assert [event.step for event in events.Scalars("eval/reward")] == [0, 3, 6]


def test_every_format_of_the_report_shows_the_reward(shown):
    folder, _ = shown
    document = json.loads(write_report(folder, "json").read_text())
    sections = {section["name"]: section for section in document["sections"]}
    panels = {p["name"]: p for s in sections.values() for g in s["groups"] for p in g["panels"]}
    rows, own = lines(folder / "metrics.jsonl"), statistics(folder)
    es, evaluation = panels["reward_steps"]["series"]
    assert (es["label"], es["y"]) == ("es", [row["reward"] for row in rows[1::2]])
    assert evaluation["y"] == [row["reward"] for row in lines(folder / "evaluations.jsonl")]
    (backprop,) = panels["own_0"]["series"]
    assert (backprop["x"], backprop["y"]) == ([1, 3, 5], [row["losses"]["backprop"] for row in rows[::2]])
    assert panels["tied_pairs"]["series"][0]["y"] == [s["tied_pairs"] for s in own]
    assert panels["reward_errors"]["series"][0]["y"] == [s["reward_errors"] for s in own]
    assert panels["exact_match"]["series"][0]["y"] == [s["exact_match"] for s in own]
    errors = int(sum(s["reward_errors"] for s in own))
    assert sections["completions"]["texts"] == [f"Rewards that went wrong in training: {errors}."]
    table, measures = sections["outcome"]["tables"]
    assert table["columns"][-1]["title"] == "reward gain"
    assert f"{errors} rewards that went wrong" in table["notes"][-1]
    assert "loss" not in [row["measure"] for row in measures["rows"]]
    assert "Reward along the way" in write_report(folder).read_text()
    markdown = write_report(folder, "md").read_text()
    assert "| reward |" in markdown
    assert (folder / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_check_says_what_each_estimator_is_after(tmp_path, write_run):
    path = tmp_path / "reward.yaml"
    path.write_text(json.dumps(document(tmp_path / "out")))
    assert [line.plain for line in objective_lines(load_run(path))] == [
        "backprop minimises causal_lm, 6 examples a batch",
        f"es maximises the reward {__name__}:fails_for_some + exact_match, 10 examples a batch",
        "evaluations measure the reward, whoever acts",
    ]
    assert list(objective_lines(load_run(write_run()))) == []
