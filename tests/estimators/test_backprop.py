import pytest
import torch
from torch import nn

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.backprop import BackpropEstimator
from hybrid_opt.noise.keys import Key, StepKey
from hybrid_opt.objectives.contract import FunctionObjective
from tests.conftest import tiny_model, token_batch, token_losses


def gradients(model, names=None, batch=None, losses=token_losses, key=0, **options):
    engine = LocalEngine(model)
    names = list(engine.parameters) if names is None else names
    batch = token_batch(6) if batch is None else batch
    estimator = BackpropEstimator(Backprop(type="backprop", learning_rate=1.0, **options))
    estimate, cost = estimator.estimate(engine, FunctionObjective(losses), batch, names, Key((key,)))
    return {shard.name: estimate.read(shard) for shard in engine.shards(names)}, cost


def torch_gradients(model, names):
    model.zero_grad()
    loss = token_losses(model, token_batch(6)).mean()
    loss.backward()
    found = {name: p.grad.flatten().clone() for name, p in model.named_parameters() if name in names}
    model.zero_grad()
    return found, loss.item()


def test_gradient_is_torchs_bitwise():
    model = tiny_model()
    expected, loss = torch_gradients(model, [name for name, _ in model.named_parameters()])
    found, cost = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (cost.loss, cost.forwards, cost.backwards) == (pytest.approx(loss, abs=1e-6), 1, 1)


@pytest.mark.parametrize("accumulation", [2, 4, 6, 9])
def test_accumulation_gives_the_gradient_of_the_whole_batch(accumulation):
    model = tiny_model()
    whole, _ = gradients(model)
    parts, cost = gradients(model, accumulation=accumulation)
    assert all(torch.allclose(parts[name], whole[name], atol=1e-6) for name in whole)
    assert cost.loss == pytest.approx(token_losses(model, token_batch(6)).mean().item(), abs=1e-6)


def test_gradient_checkpointing_changes_nothing_but_memory():
    model = tiny_model()
    kept, _ = gradients(model)
    recomputed, _ = gradients(model, gradient_checkpointing=True)
    assert all(torch.allclose(recomputed[name], kept[name], atol=1e-7) for name in kept)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_autocast_stays_within_bfloat16s_error():
    exact, _ = gradients(tiny_model())
    rounded, _ = gradients(tiny_model(), autocast="bfloat16")
    for name in exact:
        assert (rounded[name] - exact[name]).norm() < 0.05 * exact[name].norm() + 1e-4, name
        assert not torch.equal(rounded[name], exact[name])


def saved_bytes(model, names) -> int:
    """Bytes that autograd keeps for the backward pass."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(model, names)
    return sum(sizes)


def test_graph_is_cut_below_the_lowest_layer_that_is_owned():
    model = tiny_model(num_hidden_layers=4)
    names = [name for name, _ in model.named_parameters()]
    last = [name for name in names if "layers.3." in name]
    expected, _ = torch_gradients(model, last)
    found, _ = gradients(model, last)
    assert all(torch.equal(found[name], expected[name]) for name in last)
    assert saved_bytes(model, last) < 0.5 * saved_bytes(model, names)


def test_model_is_left_as_it_was():
    model = tiny_model()
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients(model, ["model.layers.1.mlp.up_proj.weight"])
    assert all(p.grad is None for p in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_gradients_that_others_left_behind_are_not_added():
    model = tiny_model()
    expected, _ = gradients(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    found, _ = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dropout_is_on_and_decided_by_the_key():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).eval()

    def losses(model, batch):
        return model(batch).pow(2).sum(1)

    state = torch.random.get_rng_state()
    first, again, other = (gradients(model, None, torch.ones(6, 8), losses, key)[0]["0.weight"] for key in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_parameters_outside_the_loss_have_gradient_zero():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    found, _ = gradients(model, None, torch.ones(3, 2), lambda model, batch: model["used"](batch)[:, 0])
    assert found["unused.weight"].tolist() == [0.0, 0.0]
    assert found["used.weight"].tolist() == [1.0, 1.0]


def test_losses_without_a_gradient_are_refused():
    with pytest.raises(UserError, match="nothing to backpropagate"):
        gradients(nn.Linear(2, 1), None, torch.ones(3, 2), lambda model, batch: model(batch).detach()[:, 0])


def test_checkpointing_needs_a_model_that_can():
    estimator = BackpropEstimator(Backprop(type="backprop", learning_rate=1.0, gradient_checkpointing=True))
    with pytest.raises(UserError, match="Linear has no gradient_checkpointing_enable"):
        estimator.check(LocalEngine(nn.Linear(2, 1)), ["weight"])


def test_checkpointing_does_not_go_through_layers_that_backprop_does_not_own():
    """transformers would let the embeddings' output require a gradient, and leave it so."""
    model, seen = tiny_model(num_hidden_layers=3), []
    model.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    engine = LocalEngine(model)
    last = [name for name in engine.parameters if ".2." in name]
    for checkpointing in (True, False):
        config = Backprop(type="backprop", learning_rate=1, gradient_checkpointing=checkpointing)
        BackpropEstimator(config).estimate(
            engine, FunctionObjective(token_losses), token_batch(), last, StepKey(0, 0, "backprop")
        )
    assert seen == [False, False]
