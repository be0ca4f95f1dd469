"""Which examples a step sees."""

from itertools import count

import pytest

from hybrid_opt.errors import UserError
from hybrid_opt.objectives.batches import IterableBatches, ShuffledBatches


def shuffled(examples: int, size: int, seed: int = 0) -> ShuffledBatches:
    return ShuffledBatches(range(examples), size, list, seed)


def epochs(batches: ShuffledBatches, per_epoch: int, number: int) -> list[list[int]]:
    return [
        [i for step in range(per_epoch) for i in batches.batch_at(epoch * per_epoch + step)] for epoch in range(number)
    ]


@pytest.mark.parametrize(("examples", "size"), [(12, 3), (11, 3), (5, 5), (7, 1)])
def test_no_example_twice_in_an_epoch(examples, size):
    per_epoch = examples // size
    orders = epochs(shuffled(examples, size), per_epoch, 40)
    for order in orders:
        assert len(set(order)) == len(order) == per_epoch * size
        assert set(order) <= set(range(examples))
    assert len({tuple(order) for order in orders}) > 20
    assert {i for order in orders for i in order} == set(range(examples))  # none is left out every time


def test_a_step_sees_the_same_batch_whatever_was_asked_before():
    batches = shuffled(11, 3, seed=7)
    sequential = [batches.batch_at(step) for step in range(30)]
    steps = [29, 0, 3, 2, 17, 17, 5, 28, 1]
    assert [batches.batch_at(step) for step in steps] == [sequential[step] for step in steps]
    assert [shuffled(11, 3, seed=7).batch_at(step) for step in steps] == [sequential[step] for step in steps]


def test_seeds_give_different_orders():
    assert len({tuple(epochs(shuffled(20, 5, seed), 4, 1)[0]) for seed in range(20)}) == 20


def test_a_batch_larger_than_the_data_is_all_of_it():
    batches = shuffled(4, 9)
    drawn = [batches.batch_at(step) for step in range(10)]
    assert all(sorted(batch) == [0, 1, 2, 3] for batch in drawn)
    assert len({tuple(batch) for batch in drawn}) > 3


def test_examples_reach_collate_in_their_order():
    batches = ShuffledBatches("abcdef", 2, "".join, seed=1)
    numbers = shuffled(6, 2, seed=1)
    assert [batches.batch_at(s) for s in range(6)] == [
        "".join("abcdef"[i] for i in numbers.batch_at(s)) for s in range(6)
    ]


# ---------------------------------------------------------------- a user's own iterable


def test_a_list_starts_again_when_it_ends():
    batches = IterableBatches(["a", "b", "c"])
    assert [batches.batch_at(step) for step in range(8)] == list("abcabcab")


def test_an_endless_generator_goes_on():
    batches = IterableBatches(count(10))
    assert [batches.batch_at(step) for step in range(5)] == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("first", range(8))
def test_a_run_resumed_at_a_step_sees_what_it_would_have_seen(first):
    batches = IterableBatches(["a", "b", "c"])
    assert [batches.batch_at(step) for step in range(first, 10)] == list("abcabcabca")[first:]


def test_an_exhausted_generator_is_refused():
    batches = IterableBatches(x for x in "ab")
    assert [batches.batch_at(0), batches.batch_at(1)] == ["a", "b"]
    with pytest.raises(UserError, match="ended after 2 batches and does not start again"):
        batches.batch_at(2)


def test_an_empty_iterable_is_refused():
    with pytest.raises(UserError, match="ended after 0 batches"):
        IterableBatches([]).batch_at(0)
