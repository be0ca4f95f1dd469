"""Who acts at each step."""

import json

import pytest

from hybrid_opt.config import load_schedule
from hybrid_opt.scheduling.schedule import build_schedule
from hybrid_opt.scheduling.signals import Signals

ESTIMATORS = {
    "a": {"type": "es", "learning_rate": 1},
    "b": {"type": "es", "learning_rate": 1},
    "bp": {"type": "backprop", "learning_rate": 1},
}


def build(**schedule):
    return build_schedule(load_schedule({"estimators": ESTIMATORS, "schedule": schedule}).schedule)


def plans(schedule, steps) -> list[dict[str, float]]:
    return [schedule.plan(step, Signals(step=step)) for step in steps]


def single(name: str) -> dict:
    return {"type": "single", "estimator": name}


def test_single_acts_at_every_step_at_full_weight():
    assert plans(build(**single("b")), range(5)) == [{"b": 1.0}] * 5


def test_turns_follow_one_another_in_the_order_written():
    schedule = build(type="alternate", pattern={"bp": 1, "a": 3, "b": 2})
    order = ["bp", "a", "a", "a", "b", "b"]
    assert plans(schedule, range(20)) == [{order[step % 6]: 1.0} for step in range(20)]


def test_blend_gives_weights_and_ramps_and_lets_weight_0_rest():
    ramp_up, ramp_down = {"start": 0, "end": 0.5, "over": 4}, {"start": 1.0, "end": 0.0, "over": 2}
    schedule = build(type="blend", weights={"a": ramp_up, "b": ramp_down, "bp": 0.25})
    assert plans(schedule, range(7)) == [
        {"b": 1.0, "bp": 0.25},
        {"a": 0.125, "b": 0.5, "bp": 0.25},
        {"a": 0.25, "bp": 0.25},
        {"a": 0.375, "bp": 0.25},
        {"a": 0.5, "bp": 0.25},
        {"a": 0.5, "bp": 0.25},
        {"a": 0.5, "bp": 0.25},
    ]
    assert plans(build(type="blend", weights={"a": 0, "bp": 2}), [0, 9]) == [{"bp": 2.0}] * 2


@pytest.mark.parametrize("start", [0.0, 2.0])
def test_somebody_acts_at_every_step_of_crossing_ramps(start):
    other = {"start": 2.0 - start, "end": start, "over": 5}
    found = plans(
        build(type="blend", weights={"a": {"start": start, "end": 2.0 - start, "over": 3}, "b": other}), range(9)
    )
    assert all(found)
    assert found[9 - 1] == {"a" if start == 0 else "b": 2.0}


# ---------------------------------------------------------------- phases

STEPS = {
    "type": "phases",
    "phases": [
        {"steps": 3, "schedule": {"type": "alternate", "pattern": {"a": 2, "bp": 1}}},
        {"steps": 4, "schedule": {"type": "alternate", "pattern": {"b": 1, "bp": 2}}},
        {"schedule": {"type": "blend", "weights": {"a": {"start": 0, "end": 1, "over": 2}, "b": 1}}},
    ],
}


def test_phases_count_their_own_steps():
    schedule = build(**STEPS)
    found = [(*schedule.plan(step, Signals(step=step)).items(), schedule.phase) for step in range(11)]
    assert found == [
        (("a", 1.0), 0),
        (("a", 1.0), 0),
        (("bp", 1.0), 0),
        (("b", 1.0), 1),
        (("bp", 1.0), 1),
        (("bp", 1.0), 1),
        (("b", 1.0), 1),
        (("b", 1.0), 2),
        (("a", 0.5), ("b", 1.0), 2),
        (("a", 1.0), ("b", 1.0), 2),
        (("a", 1.0), ("b", 1.0), 2),
    ]


def test_the_last_phase_goes_on_after_its_length():
    phases = [{"steps": 1, "schedule": single("a")}, {"steps": 2, "schedule": single("b")}]
    assert plans(build(type="phases", phases=phases), range(6)) == [{"a": 1.0}] + [{"b": 1.0}] * 5


TOKENS = {
    "type": "phases",
    "phases": [
        {"tokens": 100, "schedule": {"type": "alternate", "pattern": {"a": 1, "bp": 1}}},
        {"steps": 2, "schedule": single("b")},
        {"tokens": 50, "schedule": single("bp")},
        {"schedule": single("a")},
    ],
}
SPENT = [30, 69, 1, 200, 7, 20, 29, 1, 10, 10]  # tokens that each step processes
"""Phase 0 reaches exactly 100 after step 2; phase 2 starts at 307 and reaches 50 more with step 7."""
PHASES = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
ACTORS = ["a", "bp", "a", "b", "b", "bp", "bp", "bp", "a", "a"]


def followed(schedule, first: int, last: int) -> list[tuple[dict[str, float], int]]:
    found = []
    for step in range(first, last):
        plan = schedule.plan(step, Signals(step=step, tokens=sum(SPENT[:step])))
        found.append((plan, schedule.phase))
    return found


def test_phases_end_at_the_first_step_that_reaches_their_tokens():
    assert followed(build(**TOKENS), 0, 10) == [
        ({actor: 1.0}, phase) for actor, phase in zip(ACTORS, PHASES, strict=True)
    ]


def test_a_short_phase_of_tokens_lasts_a_step():
    phases = [{"tokens": 1, "schedule": single(name)} for name in ("a", "b", "bp")]
    assert [plan for plan, _ in followed(build(type="phases", phases=phases), 0, 4)] == [
        {"a": 1.0},
        {"b": 1.0},
        {"bp": 1.0},
        {"bp": 1.0},
    ]


@pytest.mark.parametrize("document", [STEPS, TOKENS], ids=["steps", "tokens"])
@pytest.mark.parametrize("cut", range(10))
def test_a_schedule_with_its_state_put_back_goes_on_the_same(document, cut):
    whole = followed(build(**document), 0, 10)
    first = build(**document)
    assert followed(first, 0, cut) == whole[:cut]
    second = build(**document)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert followed(second, cut, 10) == whole[cut:]


@pytest.mark.parametrize(
    "document", [single("a"), {"type": "blend", "weights": {"a": {"start": 1, "end": 2, "over": 9}}}]
)
def test_a_schedule_without_phases_remembers_nothing(document):
    schedule = build(**document)
    before = followed(schedule, 0, 10)
    assert schedule.state_dict() == {}
    schedule.load_state_dict({})
    assert followed(schedule, 0, 10) == before
    assert {phase for _, phase in before} == {None}
