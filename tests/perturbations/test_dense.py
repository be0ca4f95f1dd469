"""Members' weights, written or put in a module's place while it runs, against weights that are written out."""

import weakref

import pytest
import torch
from torch import nn

from hybrid_opt.engines.contract import Shard
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.noise.drawing import DISTRIBUTIONS
from hybrid_opt.noise.keys import Key
from hybrid_opt.objectives.contract import FunctionObjective
from hybrid_opt.perturbations.contract import Member
from hybrid_opt.perturbations.dense import DensePerturbation
from hybrid_opt.perturbations.forward_size import ForwardSize
from tests.conftest import (
    Attention,
    Recurrent,
    losses_of_members,
    losses_of_written_weights,
    tiny_model,
    token_batch,
    token_losses,
)

MEMBERS = [Member(Key((1,)), 1), Member(Key((1,)), -1), Member(Key((2,)), 1)]
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3))


class Parent(nn.Module):
    """Calls a layer and uses its weight besides, in ways that give another tensor first."""

    def __init__(self, use):
        super().__init__()
        self.layer, self.use = nn.Linear(8, 8), use

    def forward(self, x):
        return self.layer(torch.tanh(x @ self.use(self.layer.weight)))


def sum_losses(model, batch):
    return model(batch).flatten(1).pow(3).sum(1)


MODELS = {
    "llama": (lambda: tiny_model(), token_losses, token_batch()),
    "tied head": (lambda: tiny_model(tie_word_embeddings=True), token_losses, token_batch()),
    "gpt2": (lambda: tiny_model("gpt2"), token_losses, token_batch()),
    "bfloat16": (lambda: tiny_model("gpt2").bfloat16(), token_losses, token_batch()),
    "attention": (Attention, sum_losses, X),
    "lstm": (Recurrent, sum_losses, X),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), sum_losses, X),
    "weight": (lambda: Parent(lambda weight: weight), sum_losses, X),
    "weight.T": (lambda: Parent(lambda weight: weight.T), sum_losses, X),
    "weight.detach()": (lambda: Parent(lambda weight: weight.detach()), sum_losses, X),
    "weight.data": (lambda: Parent(lambda weight: weight.data), sum_losses, X),
}


@pytest.fixture(autouse=True)
def _same_weights_each_time():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def build(kind):
    make, losses, batch = MODELS[kind]
    return LocalEngine(make().eval()), losses, batch


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_members_are_evaluated_at_the_weights_they_stand_for(distribution):
    model, sigma = tiny_model(), 0.02
    engine = LocalEngine(model)
    losses = losses_of_members(engine, DensePerturbation(distribution, sigma), list(engine.parameters), MEMBERS)
    with torch.no_grad():
        before = {name: p.data.clone() for name, p in engine.parameters.items()}
        for member, found in zip(MEMBERS, losses, strict=True):
            for name, p in engine.parameters.items():
                noise = DISTRIBUTIONS[distribution]([member.key.fold(name)], 0, p.numel(), torch.device("cpu"))
                p.data.copy_(before[name] + member.sign * sigma * noise.view_as(p))
            assert torch.allclose(found, token_losses(model, token_batch()), rtol=0, atol=1e-6)
    assert (losses[0] - losses[1]).abs().min() > 1e-4


def test_combination_is_the_weighted_sum_and_slices_are_bitwise_equal():
    perturbation = DensePerturbation("gaussian", 0.1)
    keys, c = [Key((i,)) for i in range(3)], torch.tensor([0.5, -2.0, 1.25], dtype=torch.float64)
    n = 80_000

    def combined(start, count):
        out = torch.zeros(count)
        perturbation.add_noise(keys, c, Shard("w", torch.zeros(count), start, torch.Size([n])), out)
        return out

    whole = combined(0, n)
    noise = [DISTRIBUTIONS["gaussian"]([k.fold("w")], 0, n, torch.device("cpu"))[0].double() for k in keys]
    assert torch.allclose(whole.double(), sum(ci * e for ci, e in zip(c, noise, strict=True)), atol=1e-5)
    for start, count in ((0, 1), (32_000, 1000), (4_321, 70_000)):
        assert torch.equal(combined(start, count), whole[start : start + count])
    out = torch.full((n,), 3.0)
    perturbation.add_noise(keys, c, Shard("w", torch.zeros(n), 0, torch.Size([n])), out)
    assert torch.equal(out, 3.0 + whole)


@pytest.mark.parametrize("kind", MODELS)
def test_by_module_equals_written_weights_bitwise(kind):
    engine, losses, batch = build(kind)
    names = list(engine.parameters)
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in engine.model.named_parameters()}
    by_module, whole = (
        losses_of_members(engine, DensePerturbation("gaussian", 0.05, whole_model=w), names, MEMBERS, losses, batch)
        for w in (False, True)
    )
    # torch's attention adds in another order where a weight has memory of its own.
    assert torch.allclose(
        by_module, whole, rtol=0, atol=2e-6 * whole.abs().max() if kind in ("attention", "encoder") else 0
    )
    with torch.no_grad():
        assert (whole - losses(engine.model, batch)).abs().min() > 1e-4
    for name, p in engine.model.named_parameters():
        parameter, address, value = before[name]
        assert p is parameter
        assert p.data_ptr() == address
        assert torch.equal(p, value)
    if kind != "bfloat16":  # whose master weights are another copy
        written = losses_of_written_weights(engine, DensePerturbation("gaussian", 0.05), names, MEMBERS, losses, batch)
        assert torch.allclose(whole, written, rtol=1e-5, atol=1e-5)


def test_some_parameters_of_a_module():
    engine, losses, batch = build("gpt2")
    names = [name for name in engine.parameters if name.endswith("bias")]
    found = losses_of_members(engine, DensePerturbation("gaussian", 0.05), names, MEMBERS, losses, batch)
    written = losses_of_written_weights(engine, DensePerturbation("gaussian", 0.05), names, MEMBERS, losses, batch)
    assert torch.allclose(found, written, rtol=0, atol=1e-6)


def test_micro_batches_and_examples_of_each_member():
    engine, losses, batch = build("llama")
    names, examples = list(engine.parameters), torch.tensor([[0, 2], [1, 1], [2, 0]])
    whole = losses_of_members(engine, DensePerturbation("gaussian", 0.05), names, MEMBERS, losses, batch)
    rows = []

    def counted(model, batch):
        rows.append(len(batch["input_ids"]))
        return losses(model, batch)

    perturbation = DensePerturbation("gaussian", 0.05, forward_size=ForwardSize(members=3, examples=1))
    arguments = (engine, FunctionObjective(counted), batch, names, MEMBERS, examples)
    with torch.no_grad():
        perturbation.evaluate(*arguments)
        rows.clear()
        found = perturbation.evaluate(*arguments)
    assert rows == [1] * 6
    assert torch.allclose(found, whole.gather(1, examples), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "attention", "lstm"])
@pytest.mark.parametrize("whole_model", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_survive_whatever_is_raised_in_the_middle(kind, whole_model, error):
    engine, losses, batch = build(kind)
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in engine.model.named_parameters()}
    last = [module for module in engine.model.modules() if not list(module.children())][-1]
    passes = []

    def fail_within(module, args, output):
        passes.append(module)
        if len(passes) > 4:  # after the rehearsal, and within a member that is not the first
            raise error("stop")

    def failing(model, batch):
        result = losses(model, batch)
        fail_within(model, (), None)
        return result

    perturbation = DensePerturbation("gaussian", 0.05, whole_model=whole_model)
    handle = None if kind == "attention" else last.register_forward_hook(fail_within)
    with pytest.raises(error, match="stop"):
        losses_of_members(engine, perturbation, list(before), MEMBERS, failing if handle is None else losses, batch)
    if handle:
        handle.remove()
    for name, p in engine.model.named_parameters():
        parameter, address, value = before[name]
        assert p is parameter
        assert p.data_ptr() == address
        assert torch.equal(p, value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in engine.model.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_one_module_has_other_weights_at_a_time(kind, monkeypatch):
    engine, losses, batch = build(kind)
    perturbation, alive, most, own = DensePerturbation("gaussian", 0.05), [], [0], []
    owner = {id(p): module for module in engine.model.modules() for p in module._parameters.values()}
    make = perturbation._perturbed
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}

    def watched(original, member, name):
        made = make(original, member, name)
        alive[:] = [(reference, n) for reference, n in alive if reference() is not None]
        alive.append((weakref.ref(made), name))
        most[0] = max(most[0], len({owner[id(engine.parameters[n])] for _, n in alive}))
        return made

    def watching(model, batch):
        result = losses(model, batch)
        own.append(all(torch.equal(p, before[name]) for name, p in engine.parameters.items()))
        return result

    monkeypatch.setattr(perturbation, "_perturbed", watched)
    losses_of_members(engine, perturbation, list(engine.parameters), MEMBERS, watching, batch)
    assert most == [1]
    assert all(own)  # the model's own weights are never written


def test_a_whole_model_is_written_in_place_once_a_member(monkeypatch):
    engine, losses, batch = build("llama")
    perturbation, made, changed = DensePerturbation("gaussian", 0.05, whole_model=True), [], []
    make = perturbation._perturbed
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    monkeypatch.setattr(perturbation, "_perturbed", lambda *args: made.append(args[2]) or make(*args))

    def watching(model, batch):
        changed.append(sum(not torch.equal(p, before[name]) for name, p in engine.parameters.items()))
        return losses(model, batch) + losses(model, batch)

    losses_of_members(engine, perturbation, list(engine.parameters), MEMBERS, watching, batch)
    assert made == list(engine.parameters) * len(MEMBERS)
    assert [count for count in changed if count] == [len(before)] * len(MEMBERS)


def test_a_perturbation_may_serve_several_models():
    """The second one uses a weight outside its module, which the first did not."""
    perturbation = DensePerturbation("gaussian", 0.05)
    for model in (nn.ModuleDict({"layer": nn.Linear(8, 8)}), Parent(lambda weight: weight)):
        engine = LocalEngine(model)

        def losses(model, batch):
            return sum_losses(model if isinstance(model, Parent) else model["layer"], batch)

        names = list(engine.parameters)
        found = losses_of_members(engine, perturbation, names, MEMBERS, losses, X)
        written = losses_of_written_weights(engine, perturbation, names, MEMBERS, losses, X)
        assert torch.allclose(found, written, rtol=1e-5, atol=1e-4)
