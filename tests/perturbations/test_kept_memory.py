"""Memory of large outputs is handed out again only when nobody holds anything in it."""

import pytest
import torch

from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.noise.keys import Key
from hybrid_opt.perturbations import kept_memory
from hybrid_opt.perturbations.contract import Member
from hybrid_opt.perturbations.forward_size import ForwardSize
from hybrid_opt.perturbations.kept_memory import KeptMemory
from hybrid_opt.perturbations.low_rank import LowRankPerturbation
from tests.conftest import losses_of_members, tiny_model, token_losses

CPU = torch.device("cpu")
MEMBERS = [Member(Key((0,)).fold(i // 2), 1 if i % 2 == 0 else -1) for i in range(4)]


@pytest.fixture
def memory(monkeypatch) -> KeptMemory:
    monkeypatch.setattr(kept_memory, "LARGE_BYTES", 1024)
    return KeptMemory()


def take(memory: KeptMemory, *shape: int) -> torch.Tensor:
    return memory.take(shape, torch.float32, CPU)


def test_a_piece_comes_again_when_it_is_free(memory):
    first = take(memory, 16, 32)
    place = first.data_ptr()
    del first
    assert take(memory, 16, 32).data_ptr() == place


@pytest.mark.parametrize(
    "hold", [lambda t: t, lambda t: t[1:, :3], lambda t: t.detach(), lambda t: t.data, lambda t: t.numpy()]
)
def test_a_piece_that_somebody_holds_stays_theirs(memory, hold):
    first = take(memory, 16, 32).fill_(1.0)
    held, place = hold(first), first.data_ptr()
    del first
    second = take(memory, 16, 32).fill_(2.0)
    assert second.data_ptr() != place
    assert (torch.as_tensor(held) == 1).all()


def test_small_pieces_narrow_types_and_other_devices_are_left_to_torch(memory):
    assert take(memory, 4, 4) is None
    assert memory.take((16, 64), torch.bfloat16, CPU) is None
    assert memory.take((16, 32), torch.float32, torch.device("meta")) is None


def test_no_more_is_kept_than_allowed(memory, monkeypatch):
    monkeypatch.setattr(kept_memory, "KEPT_BYTES", 5000)
    held = [take(memory, 16, 32), take(memory, 16, 32)]
    assert take(memory, 16, 32) is None
    del held
    assert take(memory, 20, 32) is not None  # pieces of another shape make room


def test_an_objective_that_keeps_logits_keeps_its_own(monkeypatch):
    """Every member's forward pass would overwrite those of the one before."""
    model, kept = tiny_model(), []
    names = list(dict(model.named_parameters()))

    def losses(model, batch):
        kept.append(model(**batch, use_cache=False).logits.data)
        return token_losses(model, batch)

    def found(large: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        monkeypatch.setattr(kept_memory, "LARGE_BYTES", large)
        kept.clear()
        perturbation = LowRankPerturbation(1, 0.1, forward_size=ForwardSize(members=2))
        return losses_of_members(LocalEngine(model), perturbation, names, MEMBERS, losses), list(kept)

    plain, plain_logits = found(1 << 60)
    pooled, pooled_logits = found(64)
    assert torch.equal(plain, pooled)
    assert all(torch.equal(a, b) for a, b in zip(plain_logits, pooled_logits, strict=True))
