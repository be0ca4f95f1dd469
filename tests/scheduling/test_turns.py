"""Who has acted for how long."""

import json

import pytest

from hybrid_opt.scheduling.turns import Turns


def taken(turns: Turns, *acting: str) -> Turns:
    for names in acting:
        turns.take(names, names)
    return turns


def test_a_turn_warms_up_and_the_runs_first_does_not():
    turns, seen = Turns("ab"), {"a": [], "b": []}
    for names in ("a", "a", "b", "b", "b", "ab", "a"):
        for name in names:
            seen[name].append(turns.warmth(name, 3))
        taken(turns, names)
    assert seen["a"] == [1, 1, 1 / 3, 2 / 3]
    assert seen["b"] == [1 / 3, 2 / 3, 1, 1]  # it rested at step 0, so its first turn is one like any other
    assert turns.warmth("a", 0) == 1


def test_a_rest_lasts_until_an_update():
    """Steps in which an estimator acts but finds nothing are none of its rest, and do not end it."""
    turns = taken(Turns("ab"), "a", "b", "b")
    assert (turns.rested, turns.acted) == ({"a": 2, "b": 0}, {"a": 0, "b": 2})
    turns.take("a", ())
    assert (turns.rested["a"], turns.acted["a"]) == (2, 1)
    taken(turns, "b")
    assert turns.rested["a"] == 3
    taken(turns, "a")
    assert turns.rested == {"a": 0, "b": 1}


@pytest.mark.parametrize("at", range(6))
def test_counts_can_be_put_back(at):
    steps = ("a", "b", "ab", "a", "a", "b")
    other = Turns("ab")
    other.load_state_dict(json.loads(json.dumps(taken(Turns("ab"), *steps[:at]).state_dict())))
    assert taken(other, *steps[at:]).state_dict() == taken(Turns("ab"), *steps).state_dict()
