"""The tables of a study against numbers made by hand."""

import csv

import pyarrow.parquet
import pytest

from hybrid_opt.config.study import LearningRateGrid, LearningRateSampling
from hybrid_opt.studies.goal import compared_by
from hybrid_opt.studies.results import RESULT_TYPES, interval, result_row, summarise, write_results
from hybrid_opt.studies.search import search_factor
from hybrid_opt.studies.study_table import result_tables

RUN = {
    "steps": 3,
    "seconds": 1.5,
    "peak_memory_bytes": 700,
    "before": {"loss": 2.0, "accuracy": 0.5},
    "after": {"loss": 1.0, "accuracy": 0.75},
    "estimators": {
        "es": {"forwards": 8, "backwards": 0, "forward_equivalents": 4.0, "tokens": 100},
        "backprop": {"forwards": 2, "backwards": 2, "forward_equivalents": 6.0, "tokens": 50},
    },
}


def row(arm, seed, loss, *, metric=None, seconds=1.0, memory=100, task="t"):
    known = {"task": task, "budget": "b", "arm": arm, "seed": seed, "learning_rate_factor": 1.0, "fitted": ""}
    after = {"loss": loss, **({} if metric is None else {"accuracy": metric})}
    summary = {**RUN, "after": after, "seconds": seconds, "peak_memory_bytes": memory}
    return result_row(summary, "accuracy", **known)


def cells(*arms, task="t"):
    return [(task, "b", arm) for arm in arms]


def test_the_row_of_a_run_adds_its_estimators_up(tmp_path):
    known = {"task": "t", "budget": "b", "arm": "a", "seed": 0, "learning_rate_factor": 0.3, "fitted": "x: 1"}
    found = result_row(RUN, "accuracy", **known)
    assert found == {
        **known, "loss": 1.0, "reward": None, "metric": 0.75, "loss_before": 2.0, "reward_before": None, "metric_before": 0.5, "steps": 3, "seconds": 1.5, "forwards": 10,
        "backwards": 2, "forward_equivalents": 10.0, "tokens": 150, "peak_memory_bytes": 700, "skipped": 0, "reward_errors": 0,
    }  # fmt: skip
    assert result_row(RUN, None, **known)["metric"] is None
    write_results([found, {**found, "metric": None}], tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == list(RESULT_TYPES)
    assert {
        "arm",
        "seed",
        "budget",
        "loss",
        "metric",
        "seconds",
        "forwards",
        "backwards",
        "tokens",
        "peak_memory_bytes",
    } <= set(first)
    assert (float(first["loss"]), int(first["tokens"]), second["metric"]) == (1.0, 150, "")
    assert pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist() == [found, {**found, "metric": None}]


def test_an_interval_is_students(tmp_path):
    # By hand: mean 2, s = 1, t(2, .975) = 4.302653 (Fisher's table), 4.302653 / sqrt(3) = 2.484138
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, -0.484138, 4.484138), abs=1e-5)
    assert interval([5.0]) == (5.0, None, None)
    assert interval([]) == (None, None, None)


def test_differences_are_paired_by_seed():
    rows = [row("a", 0, 1.0), row("a", 1, 3.0), row("a", 2, 9.0), row("ref", 1, 2.0), row("ref", 0, 0.5)]
    a, ref = summarise(rows, cells("a", "ref"), "ref")
    assert (a["seeds"], a["loss"]) == (3, pytest.approx(13 / 3))
    # Seeds 0 and 1: differences .5 and 1; s = .353553, t(1, .975) = 12.706205
    assert a["loss_difference"] == pytest.approx(0.75)
    assert a["loss_difference_high"] - 0.75 == pytest.approx(12.706205 * 0.353553 / 2**0.5, rel=1e-5)
    assert ref["loss_difference"] is None
    assert a["metric"] is None


def test_the_front_holds_what_nobody_beats():
    rows = [
        row("cheap", 0, 3.0, memory=10, seconds=5),
        row("good", 0, 1.0, memory=30, seconds=5),
        row("bad", 0, 3.0, memory=20, seconds=6),
        row("fast", 0, 2.0, memory=30, seconds=1),
        row("other", 0, 0.1, memory=1, seconds=1, task="another"),
    ]
    found = summarise(rows, cells("cheap", "good", "bad", "fast", "nothing") + cells("other", task="another"), None)
    by_arm = {r["arm"]: r for r in found}
    assert {arm: r["pareto_memory"] for arm, r in by_arm.items()} == {
        "cheap": True, "good": True, "bad": False, "fast": False, "nothing": False, "other": True,
    }  # fmt: skip
    assert {arm for arm, r in by_arm.items() if r["pareto_seconds"]} == {"good", "fast", "other"}
    assert (by_arm["nothing"]["seeds"], by_arm["nothing"]["loss"]) == (0, None)


def test_a_grid_keeps_the_lowest_loss():
    losses = {0.1: 2.0, 1.0: 1.0, 10.0: float("inf")}
    grid = LearningRateGrid(type="grid", factors=tuple(losses))
    assert search_factor(grid, losses.__getitem__) == 1.0
    assert search_factor(grid, lambda factor: float("inf")) is None
    assert search_factor(grid, lambda factor: None if factor > 1 else 1.0) is None


def test_optuna_finds_the_minimum_and_asks_the_same_again():
    pytest.importorskip("optuna")
    search, asked = LearningRateSampling(type="optuna", trials=16, low=0.01, high=100), []

    def loss(factor):
        asked.append(factor)
        return float("inf") if factor > 50 else abs(factor - 3.0)

    best = search_factor(search, loss)
    assert abs(best - 3.0) == min(abs(factor - 3.0) for factor in asked) < 1
    first, asked[:] = list(asked), []
    assert search_factor(search, loss) == best
    assert asked == first


# ---------------------------------------------------------------- rewards


def rewarded(arm, seed, reward, *, goal="reward"):
    """A finished run's row whose loss is the reward's negative."""
    known = {"task": "t", "budget": "b", "arm": arm, "seed": seed, "learning_rate_factor": 1.0, "fitted": ""}
    estimators = {**RUN["estimators"], "es": {**RUN["estimators"]["es"], "counts": {"skipped": 2, "reward_errors": 1}}}
    measures = {"loss": -reward, "reward": reward, "fits": 2 * reward}
    return result_row({**RUN, "goal": goal, "estimators": estimators, "after": measures}, "fits", **known)


def test_a_reward_has_columns_of_its_own():
    row = rewarded("a", 0, 0.75)
    assert (row["loss"], row["reward"], row["metric"], row["reward_before"]) == (-0.75, 0.75, 1.5, None)
    assert (row["skipped"], row["reward_errors"]) == (2, 1)
    assert rewarded("a", 0, 0.75, goal="loss")["reward"] is None  # a measure of that name that is not the goal


def test_arms_with_rewards_are_compared_by_them():
    rows = [rewarded("a", 0, 0.25), rewarded("a", 1, 0.5), rewarded("ref", 0, 0.5), rewarded("ref", 1, 1.0)]
    found = summarise(rows, cells("a", "ref", "none"), "ref")
    a, ref, _ = found
    assert (a["reward"], a["reward_difference"], a["loss_difference"]) == (0.375, -0.375, 0.375)
    assert a["reward_difference_high"] == -a["loss_difference_low"]
    assert ref["pareto_memory"]
    assert not a["pareto_memory"]
    assert compared_by(found) == "reward"
    assert compared_by(summarise([*rows, row("none", 0, 1.0)], cells("a", "ref", "none"), "ref")) == "loss"
    assert compared_by(found[2:]) == "loss"  # nothing is known yet


def test_the_terminal_shows_the_reward_and_not_its_negative():
    rows = [rewarded("a", 0, 0.25), rewarded("ref", 0, 0.5)]
    found = [{**summary, "failed": 0} for summary in summarise(rows, cells("a", "ref"), "ref")]
    (table,) = result_tables(found, "fits", "ref")
    assert [column.header for column in table.columns][:5] == ["arm", "seeds", "reward", "difference", "fits"]
    assert [next(iter(column.cells)) for column in table.columns][:5] == ["a", "1", "0.250", "-0.250", "0.500"]
    assert table.caption == "difference: of the reward to ref's on the same seeds"
    (alone,) = result_tables(found, "reward", None)
    assert [column.header for column in alone.columns][:4] == ["arm", "seeds", "reward", "steps"]
