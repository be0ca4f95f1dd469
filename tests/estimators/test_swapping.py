"""Dense noise one module at a time, against the same noise written into the whole model."""

import weakref

import pytest
import torch
from torch import nn

from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.estimators import dense
from hybrid_opt.estimators.dense import DensePerturbation
from hybrid_opt.estimators.noise import Key
from hybrid_opt.estimators.perturbation import Member
from hybrid_opt.estimators.rehearsal import rehearse
from hybrid_opt.objectives.contract import FunctionObjective
from tests.conftest import tiny_model, token_batch, token_losses

MEMBERS = [Member(Key((0,)).fold(i // 2), 1 if i % 2 == 0 else -1) for i in range(4)]
EXAMPLES = torch.arange(3).expand(4, 3)


class Odd(nn.Module):
    """Weights read by others than their module: an embedding multiplied with, a bias of the parent's, attention, an LSTM."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(16, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.shift = nn.Parameter(torch.randn(8))
        self.unused = nn.Linear(2, 2)

    def forward(self, input_ids, **_):
        x = self.words(input_ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.memory(x)[0] + self.shift
        return x @ self.words.weight.T


def odd_losses(model, batch):
    logits = model(batch["input_ids"])[:, :-1]
    return nn.functional.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none").mean(1)


MODELS = {
    "llama, tied head": (lambda: tiny_model("llama", tie_word_embeddings=True), token_losses, token_batch()),
    "gpt2": (lambda: tiny_model("gpt2"), token_losses, token_batch()),
    "bfloat16 llama": (lambda: tiny_model("llama").bfloat16(), token_losses, token_batch()),
    "odd": (Odd, odd_losses, token_batch(vocabulary=16)),
}
each_model = pytest.mark.parametrize("kind", MODELS)


@torch.no_grad()
def evaluate(perturbation, engine, losses, batch):
    return perturbation.evaluate(engine, FunctionObjective(losses), batch, list(engine.parameters), MEMBERS, EXAMPLES)


@each_model
def test_module_by_module_equals_the_whole_model_bitwise(kind):
    make, losses, batch = MODELS[kind]
    engine = LocalEngine(make(), device="cpu")
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    by_module = evaluate(DensePerturbation("gaussian", 0.05), engine, losses, batch)
    whole = evaluate(DensePerturbation("gaussian", 0.05, whole_model=True), engine, losses, batch)
    # An LSTM gets its weights in one piece of memory or in several, which changes the last bits.
    assert torch.allclose(by_module, whole, rtol=0, atol=1e-5 if kind == "odd" else 0)
    assert (by_module[0] - by_module[1]).abs().max() > 1e-3
    assert all(torch.equal(p, before[name]) for name, p in engine.parameters.items())


def test_losses_are_those_of_weights_written_by_add_noise():
    engine = LocalEngine(Odd(), device="cpu")
    batch, perturbation = MODELS["odd"][2], DensePerturbation("rademacher", 0.05)
    found = evaluate(perturbation, engine, odd_losses, batch)
    with torch.no_grad():
        for member, losses in zip(MEMBERS, found, strict=True):
            model = Odd()
            for name, p in model.named_parameters():
                (shard,) = engine.shards([name])
                noise = torch.zeros(p.numel())
                perturbation.add_noise([member.key], torch.tensor([0.05 * member.sign]), shard, noise)
                p += noise.view_as(p)
            assert torch.allclose(losses, odd_losses(model, batch), rtol=0, atol=1e-6)


@each_model
@pytest.mark.parametrize("whole_model", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_are_put_back_when_the_objective_fails(kind, whole_model, error):
    make, losses, batch = MODELS[kind]
    engine, calls = LocalEngine(make(), device="cpu"), []
    before = {name: (p.detach().clone(), p.data_ptr()) for name, p in engine.parameters.items()}
    owners = {id(p) for module in engine.model.modules() for p in module._parameters.values() if p is not None}

    def fails_at_the_end(model, part):
        result = losses(model, part)
        calls.append(result)
        if len(calls) > 3:
            raise error
        return result

    with pytest.raises(error):
        evaluate(DensePerturbation("gaussian", 0.05, whole_model=whole_model), engine, fails_at_the_end, batch)
    for name, p in engine.parameters.items():
        assert torch.equal(p, before[name][0]), name
        assert p.data_ptr() == before[name][1]
    after = {id(p) for module in engine.model.modules() for p in module._parameters.values() if p is not None}
    assert after == owners
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in engine.model.modules())


def test_no_more_than_one_modules_weights_exist_twice(monkeypatch):
    engine = LocalEngine(tiny_model("llama"), device="cpu")
    alive, most = weakref.WeakSet(), []
    made = DensePerturbation._perturbed

    def watched(self, original, member, name):
        result = made(self, original, member, name)
        alive.add(result)
        most.append(sum(t.numel() for t in alive))
        return result

    monkeypatch.setattr(dense.DensePerturbation, "_perturbed", watched)
    evaluate(DensePerturbation("gaussian", 0.05), engine, token_losses, token_batch())
    largest = max(p.numel() for p in engine.parameters.values())
    assert max(most) <= 2 * largest  # a new module's weights are made before the garbage of the last one is gone
    assert len(most) == 4 * sum(len(list(m._parameters)) > 0 for m in engine.model.modules() if m._parameters)


def test_rehearsal_finds_what_is_used_how_and_leaves_no_trace():
    model, batch = Odd(), MODELS["odd"][2]
    parameters = dict(model.named_parameters())
    found = rehearse(model, FunctionObjective(odd_losses), batch, parameters)
    assert found.uncalled == {"unused.weight", "unused.bias", "attention.out_proj.weight", "attention.out_proj.bias"}
    assert found.outside == {
        "words.weight",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
    }
    assert found.fixed_rows == {}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    llama = tiny_model("llama")
    found = rehearse(llama, FunctionObjective(token_losses), token_batch(), dict(llama.named_parameters()))
    assert (found.uncalled, found.outside, found.fixed_rows) == (set(), set(), {})
    assert len(found.same_input) == 4  # queries, keys and values; gate and up; in two layers
    longer = rehearse(llama, FunctionObjective(token_losses), token_batch(tokens=14), dict(llama.named_parameters()))
    assert longer.bytes_per_example == 2 * found.bytes_per_example
