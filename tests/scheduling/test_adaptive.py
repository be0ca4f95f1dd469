"""The adaptive schedule: every decision is worked out by hand."""

import json
import math

import pytest

from hybrid_opt.config import load_schedule
from hybrid_opt.errors import UserError
from hybrid_opt.scheduling.schedule import build_schedule
from hybrid_opt.scheduling.signals import Signals
from tests.scheduling.test_schedule import ESTIMATORS


def build(**more):
    document = {"type": "adaptive", "estimators": ["a", "bp"], "block": 4, "per": "second", **more}
    return build_schedule(load_schedule({"estimators": ESTIMATORS, "schedule": document}).schedule)


COSTS = {"a": (2.0, 8.0), "bp": (3.0, 1.0)}
"""Forward equivalents and seconds of a step: blocks of 4 are two steps of either."""


class Course:
    """Signals of a run in which a block of each estimator changes the probe loss by so much."""

    def __init__(self, schedule, falls: dict[str, list[float]], loss: float = 10.0):
        self.schedule, self.falls, self.loss = schedule, {n: iter(f) for n, f in falls.items()}, loss
        self.signals, self.acted, self.reasons = Signals(), "", []

    def steps(self, number: int):
        for _ in range(number):
            if self.schedule.asks(self.signals):
                if self.schedule.chosen:
                    self.loss -= next(self.falls[self.schedule.chosen])
                self.signals = self.signals.told({"probe_loss": self.loss})
            ((name, weight),) = self.schedule.plan(self.signals.step, self.signals).items()
            assert weight == 1.0
            assert self.schedule.plan(self.signals.step, self.signals) == {name: 1.0}
            if self.schedule.goes_back is not None:
                self.loss = self.schedule.start_loss
                self.schedule.goes_back = None
            self.reasons.append(self.schedule.reason)
            self.acted += name[0]
            equivalents, seconds = COSTS[name]
            self.signals = self.signals.updated(loss=None, forward_equivalents=equivalents, seconds=seconds)
        return self.acted


def test_each_has_a_block_first_and_then_the_better_one_acts_by_seconds():
    """a: 1.6 in 16 s is .1 a second; bp: .4 in 2 s is .2 a second, though it fell less."""
    schedule = build(exploration=0)
    course = Course(schedule, {"a": [1.6], "bp": [0.4] * 9})
    assert course.steps(12) == "aabbbbbbbbbb"
    # After the two first blocks: a's weight .9, its total .09; bp's 1 and .2.
    assert course.reasons[0] == "a, which has had no block yet"
    assert course.reasons[2] == "bp, which has had no block yet; a brought 0.1 per second"
    assert course.reasons[4] == "bp, with the highest index, 0.2; bp brought 0.2 per second"
    assert [bool(reason) for reason in course.reasons] == [True, False] * 6


def test_rates_by_forward_equivalents_reverse_that():
    """a: 1.6 for 4 is .4; bp: .4 for 6 is .067."""
    course = Course(build(exploration=0, per="forward_equivalent"), {"a": [1.6] * 9, "bp": [0.4]})
    assert course.steps(10) == "aabbaaaaaa"


def test_a_block_ends_with_the_step_that_reaches_its_cost():
    assert Course(build(exploration=0, block=7), {"a": [16.0] * 3, "bp": [0.1]}).steps(10) == "aaaabbbaaa"


def test_the_index_is_that_of_discounted_ucb():
    """Blocks: a .1 a second, bp .2, bp .1; then by hand."""
    schedule = build(exploration=2.0, discount=0.5)
    course = Course(schedule, {"a": [1.6, 0.0], "bp": [0.4, 0.2, 0.0]})
    assert course.steps(4) == "aabb"
    course.steps(1)
    weights, totals = {"a": 0.5, "bp": 1.0}, {"a": 0.05, "bp": 0.2}
    width = 2 * 0.2 * math.sqrt(1.0)  # ln(max(e, 1.5)) = 1
    indices = {name: totals[name] / weights[name] + width / math.sqrt(weights[name]) for name in weights}
    assert {name: row["index"] for name, row in schedule.account.items()} == pytest.approx(indices)
    assert {name: row["rate"] for name, row in schedule.account.items()} == pytest.approx({"a": 0.1, "bp": 0.2})
    assert schedule.chosen == max(indices, key=indices.get) == "a"


def test_more_blocks_widen_the_index_by_their_logarithm():
    schedule = build(exploration=1.0, discount=1.0)
    course = Course(schedule, {"a": [8.0] * 20, "bp": [1.0] * 20})  # .5 a second both
    course.steps(2 * 9 + 1)
    count = {name: arm.weight for name, arm in schedule.arms.items()}
    assert sum(count.values()) == 9
    for name, row in schedule.account.items():
        assert row["index"] == pytest.approx(0.5 + 0.5 * math.sqrt(math.log(9) / count[name]))
    assert set(count.values()) == {4, 5}  # equals take turns


def test_who_becomes_worse_is_left_by_the_discount():
    falls = {"a": [1.6] * 30, "bp": [2.0, 1.0, 0.4, 0.1] + [0.01] * 30}
    acted = Course(build(exploration=0, discount=0.5), falls).steps(30)
    # bp's mean rate: 1, (.5 + .5)/1.5 = .667, (.5 + .2)/1.75, ... until it is below a's .1
    totals, weight, blocks = 0.0, 0.0, 0
    for fall in falls["bp"]:
        totals, weight, blocks = 0.5 * totals + fall / 2, 0.5 * weight + 1, blocks + 1
        if totals / weight < 0.1:
            break
    assert acted == ("aa" + "bb" * blocks + "aa" * 30)[:30]


def test_a_block_that_does_harm_is_undone():
    schedule = build(exploration=0, roll_back_above=0.5)
    course = Course(schedule, {"a": [1.0, -0.4, -0.6], "bp": [0.1, 0.0]})
    course.steps(2)
    assert (schedule.mark, schedule.goes_back) == (0, None)
    course.falls["bp"] = iter([-0.6])
    course.steps(2)
    assert schedule.mark == 2
    told = course.signals.told({"probe_loss": 9.6})  # 9.0 when the block began
    schedule.plan(4, told)
    assert schedule.goes_back == 2
    assert schedule.start_loss == 9.0
    assert schedule.mark == 4
    assert schedule.reason.endswith("bp brought -0.3 per second and is undone: the probe loss rose from 9 to 9.6")


def test_a_rise_up_to_the_limit_is_not_undone_and_a_loss_that_is_not_finite_is():
    for loss, back in ((10.5, None), (10.6, 0), (math.inf, 0), (math.nan, 0)):
        schedule = build(roll_back_above=0.5)
        course = Course(schedule, {})
        course.steps(2)
        schedule.plan(2, course.signals.told({"probe_loss": loss}))
        assert schedule.goes_back == back
        assert math.isfinite(schedule.arms["a"].rate)


@pytest.mark.parametrize("cut", range(12))
def test_a_schedule_with_its_state_put_back_decides_the_same(cut):
    falls = {"a": [1.6, 0.2, 0.1, 0.4], "bp": [0.4, 0.0, 0.1, 0.0, 0.2, 0.1, 0.0]}
    more = {"exploration": 1.0, "discount": 0.7}
    whole = Course(build(**more), falls)
    whole.steps(12)
    course = Course(build(**more), falls)
    course.steps(cut)
    course.schedule, before = build(**more), course.schedule
    course.schedule.load_state_dict(json.loads(json.dumps(before.state_dict())))
    course.steps(12 - cut)
    assert (course.acted, course.reasons) == (whole.acted, whole.reasons)
    assert {"a", "b"} == set(whole.acted[4:])


def test_what_is_missing_is_said():
    with pytest.raises(UserError, match=r"which nobody has told before step 0; set training\.probe_rows"):
        build().plan(0, Signals())
    schedule = build(per="joule")
    Course(schedule, {"a": [1.0]}).steps(2)
    signals = Signals(step=2, forward_equivalents=4, measured={"probe_loss": 9.0})
    with pytest.raises(UserError, match="joule cannot be used here, because this device does not report its energy"):
        schedule.plan(2, signals)


def test_joules_are_a_currency():
    schedule = build(per="joule", exploration=0)
    signals = Signals(measured={"probe_loss": 10.0})
    for fall in (4.0, 1.0):  # 4 for 40 joules, 1 for 5
        schedule.plan(signals.step, signals)
        signals = signals.updated(loss=None, forward_equivalents=4, joules=40 if schedule.chosen == "a" else 5)
        signals = signals.told({"probe_loss": 10.0 - fall if signals.step == 1 else 5.0})
    assert schedule.plan(2, signals) == {"bp": 1.0}
    assert schedule.account["a"]["rate"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimators": ["a"]}, "at least 2 items"),
        ({"estimators": ["a", "a"]}, "names an estimator twice"),
        ({"estimators": ["a", "c"]}, "the schedule names the estimator 'c', which is not defined"),
        ({"block": 0}, "greater than 0"),
        ({"discount": 0}, "greater than 0"),
        ({"per": "hour"}, "'second', 'forward_equivalent' or 'joule'"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        build(**change)
