from collections import namedtuple

import pytest
import torch

from hybrid_opt.objectives.contract import count_examples, select, to_device

Pair = namedtuple("Pair", "x y")
BATCH = {
    "x": torch.arange(6).view(3, 2),
    "nested": (torch.tensor([1, 2, 3]), ["a", "b", "c"]),
    "pair": Pair(torch.tensor([4, 5, 6]), "kept"),
    "scalar": torch.tensor(7),
    "options": ["of", "another", "length", "!"],
    "keep": 2,
}


def test_repeating_is_repetition_major_and_takes_lists_along():
    twice = select(BATCH, torch.arange(3).repeat(2))
    assert torch.equal(twice["x"], torch.cat([BATCH["x"], BATCH["x"]]))
    assert twice["nested"][0].tolist() == [1, 2, 3, 1, 2, 3]
    assert twice["nested"][1] == ["a", "b", "c", "a", "b", "c"]
    assert twice["pair"].x.tolist() == [4, 5, 6, 4, 5, 6]
    assert (twice["pair"].y, twice["scalar"].item(), twice["keep"]) == ("kept", 7, 2)
    assert twice["options"] == BATCH["options"]


def test_selecting_examples():
    some = select(BATCH, torch.tensor([2, 0]))
    assert some["x"].tolist() == [[4, 5], [0, 1]]
    assert some["nested"][1] == ["c", "a"]


@pytest.mark.parametrize(("batch", "count"), [(BATCH, 3), (torch.ones(4, 1), 4), (["a", "b"], None), ({"n": 1}, None)])
def test_counting_examples(batch, count):
    assert count_examples(batch) == count


def test_moving_keeps_the_form():
    moved = to_device(BATCH, torch.device("meta"))
    assert moved["x"].device.type == moved["nested"][0].device.type == moved["pair"].x.device.type == "meta"
    assert (type(moved["pair"]), moved["nested"][1], moved["options"]) == (Pair, ["a", "b", "c"], BATCH["options"])
