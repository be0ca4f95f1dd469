"""Phases that signals end: every decision is worked out by hand."""

import json

import pytest

from hybrid_opt.config import load_schedule
from hybrid_opt.errors import UserError
from hybrid_opt.scheduling.schedule import build_schedule
from hybrid_opt.scheduling.signals import Signals
from tests.scheduling.test_schedule import ESTIMATORS, single


def build(*phases):
    document = {"estimators": ESTIMATORS, "schedule": {"type": "phases", "phases": list(phases)}}
    return build_schedule(load_schedule(document).schedule)


def trace(schedule, rows, signals=Signals(), *, first=0) -> tuple[str, Signals]:
    """The phase of each step as a digit, each step having measured what its row says."""
    found = ""
    for step, row in enumerate(rows, start=first):
        schedule.plan(step, signals)
        found += str(schedule.phase)
        assert schedule.plan(step, signals) == schedule.plan(step, signals)  # asking again decides nothing
        row = dict(row)
        loss = row.pop("loss", None)
        amounts = {name: row.pop(name) for name in ("seconds", "forwards") if name in row}
        signals = signals.updated(loss=loss, measured=row, **amounts)
    return found, signals


def measuring(name: str, *values) -> list[dict]:
    """A step for each value; None: it measured nothing."""
    return [{} if value is None else {name: value} for value in values]


def until(signal: str, *, phase=None, **more):
    limits = {key: more.pop(key) for key in ("above", "below", "for") if key in more}
    return {"until": {"signal": signal, **limits}, "schedule": single("a"), **more}


LAST = {"schedule": single("bp")}


def test_a_signal_below_its_limit_ends_a_phase_before_the_next_step():
    found, _ = trace(build(until("a.snr", below=1), LAST), measuring("a.snr", 3, 1, 0.9, 3, 3))
    assert found == "00011"  # 1 is not below 1


def test_measurements_must_follow_one_another_but_a_step_without_one_does_not_interrupt():
    schedule = build(until("a.snr", **{"below": 1, "for": 3}), LAST)
    found, _ = trace(schedule, measuring("a.snr", 0.5, 0.5, 2, 0.5, None, 0.5, None, 0.5, 9, 9))
    assert found == "0000000011"
    assert schedule.reason is None  # of the latest plan, which went on
    schedule = build(until("a.snr", **{"below": 1, "for": 3}), LAST)
    signals = Signals()
    for step, value in enumerate([0.5, 0.25, 0.125]):
        schedule.plan(step, signals)
        signals = signals.updated(loss=None, measured={"a.snr": value})
    schedule.plan(3, signals)
    assert schedule.reason == "phase 1 after a.snr below 1 3 times in a row (now 0.125)"


def test_shortest_and_longest():
    values = measuring("a.snr", 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
    assert trace(build(until("a.snr", below=1, at_least=4), LAST), values)[0] == "000011"
    assert trace(build(until("a.snr", above=1, at_most=3), LAST), values)[0] == "000111"


def test_totals_count_from_the_start_of_the_phase():
    phases = [until("forwards", above=5), {"steps": 1, "then": 0, "schedule": single("bp")}]
    found, _ = trace(build(*phases), measuring("forwards", *[2] * 12))
    assert found == "000100010001"  # 6 forwards are above 5, so three steps; those of phase 1 do not count


def test_going_back_and_cooling_down():
    """Phase 0 is left before step 2 and silent until step 2 + 6 = 8; the measurement of step 7 is the first that may end it again, before
    step 8, where it is left and silent until 14."""
    phases = [until("a.snr", below=1, cool_down=6, at_least=2), {"steps": 1, "then": 0, "schedule": single("bp")}]
    found, _ = trace(build(*phases), measuring("a.snr", *[0.5] * 16))
    assert found == "0010000010000010"


def test_another_way_through_the_phases():
    phases = [
        {"steps": 2, "then": 2, "schedule": single("a")},
        {"steps": 1, "schedule": single("b")},
        {"steps": 1, "then": 1, "schedule": single("bp")},
    ]
    assert trace(build(*phases), [{}] * 9)[0] == "002121212"


def test_the_slope_is_that_of_least_squares_over_the_phases_latest_20_losses():
    losses = [5 - 0.5 * t + (-1) ** t * 0.1 for t in range(30)]
    signals = Signals()
    for loss in losses:
        assert signals.loss_slope() is None or signals.step >= 20
        signals = signals.updated(loss=loss)
    # sum_t (t - 9.5) (-1)^t over 20 steps is -10, the variance's sum 665
    assert signals.loss_slope() == pytest.approx(-0.5 - 0.1 * 10 / 665)
    assert signals.loss_slope(first=10) == signals.loss_slope()
    assert signals.loss_slope(first=11) is None
    assert signals.updated(loss=None).loss_slope() is None


def test_a_plateau_ends_a_phase_of_20_steps_and_more():
    """From step 20 on the loss stays: the slopes over 20 steps reach -0.01 where few of them are left that fell."""
    losses = [{"loss": max(0.0, 2 - 0.1 * step)} for step in range(60)]
    schedule = build(until("loss_slope", above=-0.01), {"steps": 30, "then": 0, "schedule": single("bp")})
    found, _ = trace(schedule, losses)
    assert (
        found.index("1") == 37
    )  # of steps 17 to 36: losses .3 .2 .1 0 0 ..., slope -.1 (3*9.5 + 2*8.5 + 7.5)/665 = -.00797
    before = -0.1 * (4 * 9.5 + 3 * 8.5 + 2 * 7.5 + 6.5) / 665
    assert before < -0.01
    assert _reason(schedule, losses) == "phase 1 after loss_slope above -0.01 (now -0.00797)"


def _reason(schedule, losses):
    again = type(schedule)(schedule.schedule)
    trace(again, losses[:38])
    return again.reason


@pytest.mark.parametrize("cut", range(0, 16, 3))
def test_a_schedule_with_its_state_put_back_decides_the_same(cut):
    phases = [
        until("a.snr", **{"below": 1, "for": 2}, cool_down=5),
        {"steps": 2, "then": 0, "schedule": single("bp")},
    ]
    rows = measuring("a.snr", 0.5, 0.5, 2, 0.5, 0.5, 0.5, 0.5, 0.5, 2, 0.5, 0.5, 2, 2, 0.5, 0.5, 0.5)
    whole, _ = trace(build(*phases), rows)
    assert {"0", "1"} == set(whole)
    first = build(*phases)
    begun, signals = trace(first, rows[:cut])
    second = build(*phases)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + trace(second, rows[cut:], signals, first=cut)[0] == whole


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([until("snr", below=1), LAST], "there is no signal 'snr'; of the run there are steps, .*; of an estimator NAME.snr"),
        ([until("a.snrr", below=1), LAST], r"there is no signal 'a.snrr'; .* \(did you mean 'snr'\?\)"),
        ([until("c.snr", below=1), LAST], "the trigger of phase 0 names the estimator 'c', which is not defined"),
        ([until("loss", below=1, above=2), LAST], "needs either above or below"),
        ([until("loss"), LAST], "needs either above or below"),
        ([until("loss", below=1, steps=3), LAST], "phase 0 has a length both in steps and in until; keep one"),
        ([until("loss", below=1)], "phase 0 has until, but nothing follows"),
        ([until("loss", below=1, at_least=5, at_most=4), LAST], "phase 0 has at_most 4, less than at_least 5"),
        ([{"steps": 1, "at_most": 4, "schedule": single("a")}, LAST], "go with until"),
        ([until("loss", below=1, then=2), LAST], "phase 0: then 2 is no other phase; write one of 1"),
        ([{"steps": 2, "schedule": single("a")}, {**LAST, "then": 0}], "phase 1 says what follows .then., but has no length"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(phases, message):
    with pytest.raises(UserError, match=message):
        build(*phases)
