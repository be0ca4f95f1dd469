"""Drawing and splitting questions."""

import pytest

from hybrid_opt.errors import UserError
from hybrid_opt.tasks.sampling import LISTED, belongs, different, drawn


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_small_space_is_drawn_whole(size):
    assert sorted(drawn(size, 0)) == list(range(size))


@pytest.mark.parametrize("size", [LISTED + 1, 10**60])
def test_a_large_space_is_drawn_as_far_as_needed(size):
    order = drawn(size, 3)
    some = [next(order) for _ in range(5000)]
    assert len(set(some)) == 5000
    assert 0 <= min(some) < size / 100 < 99 * size / 100 < max(some) < size
    again = drawn(size, 3)
    assert [next(again) for _ in range(10)] == some[:10]


def test_splits_are_fixed_and_make_up_the_whole():
    """The hash must not change: runs resumed later, and other machines, hold out the same questions."""
    questions = [f"{n} + 1" for n in range(5000)]
    held = {q for q in questions if belongs(q, "held_out")}
    assert [q for q in questions[:20] if q in held] == ["8 + 1", "9 + 1", "19 + 1"]
    assert {q for q in questions if belongs(q, "train")} == set(questions) - held
    assert all(belongs(q, "all") for q in questions)
    assert abs(len(held) - 1000) < 5 * (5000 * 0.2 * 0.8) ** 0.5


def test_rows_stop_where_nothing_new_comes():
    def endless():
        while True:
            yield from (("a", {"n": 1}), None, ("b", {"n": 2}), ("a", {"n": 3}))

    assert different(endless(), 2, "all") == [{"n": 1}, {"n": 2}]
    with pytest.raises(
        UserError, match=r"^rows: 3 rows .* gave only 2; write rows: 2, or options with more questions$"
    ):
        different(endless(), 3, "all", patience=50)
    with pytest.raises(UserError, match=r"only 0 in the split 'train'.*or split: all$"):
        different([], 3, "train")
