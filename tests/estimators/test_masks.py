"""Masks against sorting, and ranks that hold parts of the weights against one that holds all."""

import threading
from types import SimpleNamespace

import pytest
import torch

from hybrid_opt.engines.contract import Shard
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.estimators import masks
from hybrid_opt.estimators.noise import Key
from hybrid_opt.estimators.wrappers.relative_sigma import root_mean_squares
from tests.conftest import tiny_model

CPU = torch.device("cpu")


def magnitude(shard: Shard) -> torch.Tensor:
    return shard.data.abs()


class Cut:
    """An engine whose parameters are cut in two, each part on a rank of its own: two threads that wait for each other."""

    def __init__(self, engine: LocalEngine):
        self.engine, self.barrier, self.sent = engine, threading.Barrier(2, timeout=20), [None, None]

    def of_rank(self, rank: int) -> SimpleNamespace:
        def gather(values):
            self.sent[rank] = values.clone()
            self.barrier.wait()
            both = torch.stack(self.sent)
            self.barrier.wait()
            return both

        def shards(names):
            for s in self.engine.shards(names):
                cut = len(s.data) // 3
                part, start = (s.data[:cut], 0) if rank == 0 else (s.data[cut:], cut)
                if len(part):
                    yield Shard(s.name, part, start, s.shape)

        ranks = SimpleNamespace(gather=gather, world_size=2)
        return SimpleNamespace(ranks=ranks, shards=shards, parameters=self.engine.parameters, device=CPU)

    def run(self, function):
        """What a function of an engine returns on both ranks."""
        found = [None, None]
        threads = [threading.Thread(target=lambda r=r: found.__setitem__(r, function(self.of_rank(r)))) for r in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_packing_keeps_every_value_and_slices_are_those_of_the_whole(count):
    mask = torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.3
    bits = masks.packed(mask)
    assert bits.nbytes == -(-count // 8)
    assert masks.size_of(bits) == int(mask.sum())
    for start in (0, 1, 5, 8, 13):
        for length in (0, 1, 8, count):
            wanted = mask[start : start + length]
            assert torch.equal(masks.unpacked(bits, start, len(wanted)), wanted)


@pytest.mark.parametrize("keep", [0.003, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("select", [masks.smallest, masks.largest])
def test_the_border_is_that_of_sorting(select, keep):
    engine = LocalEngine(tiny_model())
    names = [name for name in engine.parameters if "norm" not in name]
    found = select(engine, names, magnitude, keep)
    for shard in engine.shards(names):
        values, chosen = shard.data.abs(), masks.unpacked(found[shard.name], 0, len(shard.data))
        count = max(1, round(keep * len(values)))
        border = values.sort(descending=select is masks.largest).values[count - 1]
        assert torch.equal(chosen, values <= border if select is masks.smallest else values >= border)
        assert count <= int(chosen.sum()) <= count + 2  # floats of a few thousand weights may be equal


def test_equal_values_are_all_in_and_zeros_never_among_the_largest():
    engine = LocalEngine(torch.nn.Linear(4, 3, bias=False))
    engine.model.weight.data = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, -1, 1, 2, 3, -4]).view(3, 4)
    for select, keep, size in (
        (masks.smallest, 1 / 12, 6),
        (masks.smallest, 7 / 12, 9),
        (masks.largest, 2 / 12, 2),
        (masks.largest, 4 / 12, 6),
        (masks.largest, 1.0, 6),
    ):
        assert masks.size_of(select(engine, ["weight"], magnitude, keep)["weight"]) == size


def test_random_masks_have_the_share_and_follow_from_their_key():
    engine, key = LocalEngine(torch.nn.Linear(400, 500)), Key((3,))
    found = masks.random(engine, ["weight"], key, 0.2)["weight"]
    n = 200_000
    assert abs(masks.size_of(found) - 0.2 * n) < 4 * (0.2 * 0.8 * n) ** 0.5
    assert torch.equal(found, masks.random(engine, ["weight", "bias"], key, 0.2)["weight"])
    other = masks.random(engine, ["weight"], Key((4,)), 0.2)["weight"]
    shared = (masks.unpacked(found, 0, n) & masks.unpacked(other, 0, n)).sum().item()
    assert abs(shared - 0.04 * n) < 4 * (0.04 * 0.96 * n) ** 0.5


@pytest.mark.parametrize("select", [masks.smallest, masks.largest])
def test_ranks_that_hold_parts_have_the_masks_of_the_whole(select):
    engine = LocalEngine(tiny_model())
    names = list(engine.parameters)
    whole = select(engine, names, magnitude, 0.2)
    for found in Cut(engine).run(lambda rank: select(rank, names, magnitude, 0.2)):
        assert all(torch.equal(found[name], whole[name]) for name in names)


def test_ranks_that_hold_parts_have_the_sizes_of_the_whole():
    engine = LocalEngine(tiny_model())
    names = list(engine.parameters)
    first, second = Cut(engine).run(lambda rank: root_mean_squares(rank, names))
    assert first == second == pytest.approx(root_mean_squares(engine, names), rel=2e-7)
