"""How a population is cut into forward passes, and what happens when one does not fit."""

import warnings

import pytest
import torch

from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.noise.keys import Key
from hybrid_opt.objectives.contract import FunctionObjective
from hybrid_opt.perturbations import forward_size
from hybrid_opt.perturbations.contract import Member
from hybrid_opt.perturbations.dense import DensePerturbation
from hybrid_opt.perturbations.forward_size import ForwardSize
from hybrid_opt.perturbations.low_rank import LowRankPerturbation
from tests.conftest import losses_of_members, tiny_model, token_batch, token_losses

ENGINE = LocalEngine(torch.nn.Linear(1, 1))
MEMBERS = [Member(Key((0,)).fold(i // 2), 1 if i % 2 == 0 else -1) for i in range(8)]
EXAMPLES = torch.arange(3).expand(8, 3)
BATCH = token_batch()  # 3 examples of 7 tokens
LOSS = FunctionObjective(token_losses)


class Writes(FunctionObjective):
    """Makes passes of one token, and keeps some memory of each row."""

    row_elements = 1

    def __init__(self, row_bytes: int = 0):
        super().__init__(token_losses, differentiable=False)
        self.kept, self.tally = row_bytes, None

    def seeded(self, batch, key):
        return batch

    def rehearsal(self):
        return LOSS

    def row_bytes(self, model, batch):
        return self.kept


def pieces(size: ForwardSize, members=8, examples=3, together=2, batch=BATCH, bytes_per_example=1, objective=LOSS):
    """(members, examples) of each forward pass, in order; every loss is written once."""
    seen, done = [], torch.zeros(members, examples)

    def losses_of(piece):
        done[piece.members, piece.examples] += 1
        shape = done[piece.members, piece.examples].shape
        seen.append(tuple(shape))
        return torch.zeros(shape)

    numbers = torch.arange(examples).expand(members, examples)
    size.evaluate(losses_of, objective, batch, numbers, together, bytes_per_example, ENGINE)
    assert torch.equal(done, torch.ones(members, examples))
    return seen


def test_members_are_split_evenly_and_pairs_stay_together():
    assert pieces(ForwardSize(members=8)) == [(8, 3)]
    assert pieces(ForwardSize(members=6)) == [(4, 3), (4, 3)]
    assert pieces(ForwardSize(members=5)) == [(4, 3), (4, 3)]
    assert pieces(ForwardSize(members=3)) == [(2, 3)] * 4
    assert pieces(ForwardSize(members=1)) == [(1, 3)] * 8
    assert pieces(ForwardSize(members=3), members=7, together=1) == [(2, 3), (2, 3), (3, 3)]


def test_micro_batches_split_examples_evenly():
    assert pieces(ForwardSize(members=8, examples=2)) == [(8, 1), (8, 2)]
    assert pieces(ForwardSize(members=4, examples=1)) == [(4, 1)] * 6
    assert pieces(ForwardSize(examples=50)) == pieces(ForwardSize(examples=3)) == [(8, 3)]  # more than there are


def test_by_itself_it_takes_what_is_efficient_and_fits(monkeypatch):
    monkeypatch.setitem(forward_size.EFFICIENT, "cpu", 10**9)
    monkeypatch.setattr(forward_size, "free_memory_bytes", lambda device, limit: 2 * 12 * 1000)  # 12 rows in half of it
    assert pieces(ForwardSize(), bytes_per_example=1000) == [(4, 3), (4, 3)]
    assert pieces(ForwardSize(), bytes_per_example=6000) == [(1, 1), (1, 2)] * 8
    assert pieces(ForwardSize(), bytes_per_example=10**9) == [(1, 1)] * 24
    monkeypatch.setitem(forward_size.EFFICIENT, "cpu", 6 * 7)  # six rows of seven tokens
    assert pieces(ForwardSize(), bytes_per_example=1) == [(2, 3)] * 4


def test_where_passes_are_of_one_token_it_takes_more_rows(monkeypatch):
    """Long prompts must not make the passes small that write."""
    monkeypatch.setitem(forward_size.EFFICIENT, "cpu", 12)
    assert pieces(ForwardSize(), objective=Writes()) == [(4, 3), (4, 3)]
    assert pieces(ForwardSize(), objective=Writes(), together=1) == [(4, 3), (4, 3)]
    monkeypatch.setattr(forward_size, "free_memory_bytes", lambda device, limit: 2 * 6 * 1000)
    assert pieces(ForwardSize(), objective=Writes(600), bytes_per_example=400) == [(2, 3)] * 4


def test_out_of_memory_halves_and_goes_on_with_one_warning():
    engine = LocalEngine(tiny_model(), device="cpu")
    names, most, rows = list(engine.parameters), 5, []

    def losses(model, batch):
        rows.append(len(batch["input_ids"]))
        if rows[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_losses(model, batch)

    def evaluate(perturbation, function):
        with torch.no_grad():
            return perturbation.evaluate(engine, FunctionObjective(function), BATCH, names, MEMBERS, EXAMPLES)

    expected = evaluate(LowRankPerturbation(1, 0.05), token_losses)
    limited = LowRankPerturbation(1, 0.05, forward_size=ForwardSize(members=8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = evaluate(limited, losses)
        tried = len(rows)
        second = evaluate(limited, losses)
    assert torch.allclose(first, expected, rtol=0, atol=1e-5)
    assert torch.allclose(second, expected, rtol=0, atol=1e-5)
    assert [w.category for w in caught] == [RuntimeWarning]
    assert "out of memory" in str(caught[0].message)
    assert max(rows[:tried]) == 24
    assert max(rows[tried:]) <= most  # it remembers


@pytest.mark.filterwarnings("ignore:out of memory")
def test_what_does_not_fit_alone_is_an_error():
    engine, calls = LocalEngine(tiny_model(), device="cpu"), []

    def losses(model, batch):
        calls.append(len(batch["input_ids"]))
        raise torch.OutOfMemoryError("CUDA out of memory")

    perturbation = LowRankPerturbation(1, 0.05, forward_size=ForwardSize(members=2))
    losses_of_members(engine, perturbation, list(engine.parameters), MEMBERS)  # begins with a rehearsal
    with pytest.raises(torch.OutOfMemoryError):
        losses_of_members(engine, perturbation, list(engine.parameters), MEMBERS, losses)
    assert calls == [6, 3, 1]


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("most", [1, 2, 3, 7])
@pytest.mark.parametrize("settings", [{}, {"members": 4, "examples": 2}])
def test_whatever_fits_the_losses_are_the_same(most, settings):
    """From the rehearsal on, which takes fewer examples too, down to a single row."""
    engine, rows = LocalEngine(tiny_model(), device="cpu"), []
    names = list(engine.parameters)

    def losses(model, batch):
        rows.append(len(batch["input_ids"]))
        if rows[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_losses(model, batch)

    for kind in (LowRankPerturbation, DensePerturbation):
        form = 1 if kind is LowRankPerturbation else "gaussian"
        expected = losses_of_members(engine, kind(form, 0.05), names, MEMBERS)
        limited = kind(form, 0.05, forward_size=ForwardSize(**settings))
        for _ in range(2):
            rows.clear()
            assert torch.allclose(
                losses_of_members(engine, limited, names, MEMBERS, losses), expected, rtol=0, atol=1e-5
            )
        assert max(rows) <= most
