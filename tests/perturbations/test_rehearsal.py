"""What a first forward pass shows, and that it leaves the model as it was."""

import pytest
import torch
from torch import nn

from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.objectives.contract import FunctionObjective
from hybrid_opt.perturbations.rehearsal import rehearse
from tests.conftest import tiny_model, token_batch, token_losses

IDS = torch.tensor([[1, 5, 2, 0, 7], [8, 3, 3, 1, 2], [4, 0, 6, 6, 5]])


class Odd(nn.Module):
    """Parameters that are used in ways that hooks around their modules do not see."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.types = nn.Embedding(9, 8), nn.Embedding(6, 8), nn.Embedding(2, 8)
        self.layer, self.unused, self.direct = nn.Linear(8, 8), nn.Linear(2, 2), nn.Linear(8, 8, bias=False)
        self.seen = nn.Linear(8, 8)

    def forward(self, ids):
        tokens = torch.arange(ids.shape[1])
        x = self.words(ids) + self.places(tokens) + self.types(torch.zeros_like(tokens)[None])
        x = self.direct.forward(self.layer(x))
        x = self.seen(x.to(self.seen.weight.dtype)).view(*x.shape[:2], self.seen.weight.shape[0])
        assert self.seen.weight.requires_grad
        assert self.seen.bias.dim() == 1
        return x @ self.words.weight.T


def sum_losses(model, batch):
    return model(batch).sum((1, 2))


@torch.no_grad()
def rehearsed(model, losses=sum_losses, batch=IDS):
    engine = LocalEngine(model)
    return rehearse(engine, FunctionObjective(losses), batch, dict(engine.parameters))


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_what_is_found(examples):
    found = rehearsed(Odd(), batch=IDS[:examples])
    assert found.uncalled == {"unused.weight", "unused.bias", "direct.weight"}
    assert found.outside == {"words.weight", "direct.weight"}  # looking at a dtype or a shape is not a use
    assert found.fixed_rows == {"places.weight": 5}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_nothing_is_found_in_a_model_that_hooks_see_through(kind):
    found = rehearsed(tiny_model(kind), token_losses, token_batch())
    assert (found.uncalled, found.outside, dict(found.fixed_rows)) == (frozenset(), frozenset(), {})


def test_bytes_are_those_of_the_largest_module_and_grow_with_tokens():
    for tokens in (7, 14):
        found = rehearsed(tiny_model(), token_losses, token_batch(tokens=tokens))
        assert found.bytes_per_example == tokens * 4 * (32 + 3 * 64)  # the head: its input, and three times its output


def test_projections_of_the_same_input_are_found():
    found = rehearsed(tiny_model(), token_losses, token_batch())
    layer = "model.layers.0."
    assert found.same_input[:2] == (
        tuple(f"{layer}self_attn.{name}_proj.weight" for name in "qkv"),
        tuple(f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up")),
    )


def test_batches_without_tensors_are_evaluated_whole_and_once():
    seen = []

    def losses(model, batch):
        seen.append(batch)
        return sum_losses(model, IDS)

    found = rehearsed(Odd(), losses, ["some", "texts"])
    assert seen == [["some", "texts"]]
    assert "words.weight" in found.outside
    assert dict(found.fixed_rows) == {}


@pytest.mark.parametrize("kind", ["generated", "drawn"])
def test_inputs_that_are_drawn_at_random_are_no_scattered_rows(kind):
    """An objective that samples texts, or masks tokens, sees other tokens each time."""
    model = tiny_model()

    def losses(model, batch):
        ids = batch["input_ids"]
        if kind == "generated":
            mask = torch.ones_like(ids)
            model.generate(input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=8, pad_token_id=0)
        return token_losses(model, {**batch, "input_ids": torch.where(torch.rand(ids.shape) < 0.5, ids, 3)})

    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = rehearsed(model, losses, token_batch())
    assert (found.uncalled, found.outside) == (frozenset(), frozenset())
    assert (dict(found.fixed_rows), dict(found.scattered_rows)) == ({}, {})


@pytest.mark.parametrize("fails_at", [None, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was(fails_at, error):
    model, calls = Odd(), []
    model.layer.eval()
    sum_losses(model, IDS).sum().backward()
    state = [
        {name: (p, p.data_ptr(), p.clone(), p.grad, p.requires_grad) for name, p in model.named_parameters()},
        [module.training for module in model.modules()],
        [p for module in model.modules() for p in module._parameters.values()],
    ]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def fail(module, args, output):
        calls.append(module)
        if len(calls) == fails_at:
            raise error("stop")

    handle = model.seen.register_forward_hook(fail)
    if fails_at:
        with pytest.raises(error, match="stop"):
            rehearsed(model)
    else:
        rehearsed(model)
    handle.remove()
    for name, p in model.named_parameters():
        parameter, address, value, gradient, requires_grad = state[0][name]
        assert p is parameter
        assert (p.data_ptr(), p.requires_grad) == (address, requires_grad)
        assert torch.equal(p, value)
        assert p.grad is gradient
        assert gradient is None or torch.equal(gradient, gradients[name])
    assert [module.training for module in model.modules()] == state[1]
    now = [p for module in model.modules() for p in module._parameters.values()]
    assert all(a is b for a, b in zip(now, state[2], strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("most", [1, 2, 3])
def test_fewer_examples_where_memory_is_short(most):
    rows = []

    def losses(model, batch):
        rows.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("out of memory")
        return sum_losses(model, batch)

    found = rehearsed(Odd(), losses)
    assert "words.weight" in found.outside
    assert ("places.weight" in found.fixed_rows) == (most > 1)  # else no forward pass will hold two members
    assert set(rows) == ({1, 2} if most == 1 else {1, 2, 4})
