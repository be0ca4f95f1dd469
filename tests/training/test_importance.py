"""Policies whose layers are measured: by hand, resumed, replayed."""

import pytest
import torch

from hybrid_opt.config import load_schedule
from hybrid_opt.display.progress import Silence
from hybrid_opt.errors import UserError
from hybrid_opt.scheduling.ownership import Ownership
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from hybrid_opt.training.trainer import Trainer
from tests.conftest import interrupt_after, tiny_model, token_batch, token_losses
from tests.training.test_trainer import lines

ES = {"type": "es", "population_size": 4, "learning_rate": 1e-2, "fitness_shaping": "none"}
ADAMW = {"type": "backprop", "learning_rate": 1e-2}
BATCHES = [token_batch(tokens=n) for n in (5, 9, 12)]


def schedule(layers, pattern=None, **more) -> dict:
    return {
        "estimators": {"es": ES, "backprop": ADAMW},
        "policy": [{"layers": layers, "use": ["backprop"]}, {"match": ".*", "use": ["es"]}],
        "schedule": {"type": "alternate", "pattern": pattern or {"backprop": 1, "es": 1}},
        **more,
    }


def model():
    return tiny_model(num_hidden_layers=4)


def gradient_norms(net, batch) -> dict[int, float]:
    """By autograd and a loop."""
    net.zero_grad()
    token_losses(net.eval(), batch).mean().backward()
    squares = {}
    for name, p in net.named_parameters():
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            squares[layer] = squares.get(layer, 0.0) + p.grad.double().square().sum().item()
    net.zero_grad()
    return {layer: square**0.5 for layer, square in squares.items()}


def owned_layers(optimizer) -> set[int]:
    return {int(name.split(".")[2]) for name in optimizer.may_move("backprop")}


def test_layers_with_the_longest_gradients_are_chosen_again_every_two_steps():
    """The trace by hand: in steps 0, 2, 4 the two layers with the highest norms at the weights of then, between them the same."""
    net = model()
    own = HybridOptimizer(net, token_losses, schedule=schedule({"top": 2, "by": "gradient_norm", "every": 2}))
    chosen = None
    for step in range(5):
        norms = gradient_norms(net, BATCHES[step % 3])
        report = own.step(BATCHES[step % 3])
        if step % 2 == 0:
            assert report.profile.importance["policy.0"] == pytest.approx(norms, rel=1e-5)
            chosen = set(sorted(norms, key=norms.get)[-2:])
            assert (
                report.profile.decision
                == f"policy.0: layers {', '.join(map(str, sorted(chosen)))} are the top 2 by gradient_norm"
            )
        else:
            assert report.profile is None
        assert owned_layers(own) == chosen
        assert {int(n.split(".")[2]) for n in own.may_move("es") if "layers" in n} == set(range(4)) - chosen
    assert own.signals.backwards == 3 + 3  # of backprop's own steps 0, 2, 4, and of the measurements before them


def test_only_owners_move_what_they_own():
    net = model()
    own = HybridOptimizer(net, token_losses, schedule=schedule({"top": 1, "by": "gradient_norm", "every": 1}))
    for step in range(4):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        own.step(BATCHES[step % 3])
        moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
        assert moved == set(own.may_move("es" if step % 2 else "backprop"))


def test_sensitivity_estimates_the_norms_without_a_gradient():
    """Over 200 probes the root of the mean square is within 15 % (three times its error) of the norm by autograd."""
    layers = {"top": 2, "by": "sensitivity", "probes": 200, "sigma": 1e-4}
    net, batch = model().double(), token_batch(tokens=9)
    norms = gradient_norms(net, batch)
    objective_has_no_gradient = torch.no_grad()(token_losses)
    own = HybridOptimizer(net, objective_has_no_gradient, schedule=schedule(layers, {"es": 1, "backprop": 9}))
    report = own.step(batch)
    assert report.profile.importance["policy.0"] == pytest.approx(norms, rel=0.15)
    assert report.profile.cost.forwards == 4 * 200 * 2 == report.forwards - 4
    assert owned_layers(own) == set(sorted(norms, key=norms.get)[-2:])


def test_two_measured_rules_share_the_layers_out():
    config = load_schedule(
        {
            **schedule({"top": 1, "by": "gradient_norm"}),
            "policy": [
                {"match": r"layers\.3\.|norm|embed|head", "use": "frozen"},
                {"layers": {"top": 1, "by": "gradient_norm"}, "use": ["backprop"]},
                {"layers": {"top": 1, "by": "gradient_norm"}, "use": ["es"]},
                {"match": ".*", "use": "frozen"},
            ],
        }
    )
    names = [name for name, _ in model().named_parameters()]
    own = Ownership(config, names)
    assert {tuple(w) for n, w in own.widest[None].owners.items() if "layers.1.mlp" in n} == {("backprop", "es")}
    assert set(own.due(None, 0)) == {"policy.1", "policy.2"}
    assert own.choose("policy.1", {0: 1.0, 1: 3.0, 2: 2.0}, 0) == [1]
    assert own.choose("policy.2", {0: 1.0, 1: 3.0, 2: 2.0}, 0) == [2]
    assert not own.due(None, 1000)
    assert {n.split(".")[2] for n in own.names(None, "backprop")} == {"1"}
    assert {n.split(".")[2] for n in own.names(None, "es")} == {"2"}


def trainer(folder, **more) -> Trainer:
    chosen = schedule({"top": 1, "by": "gradient_norm", "every": 3}, {"es": 2, "backprop": 1})
    return Trainer(model(), token_losses, BATCHES, schedule=chosen, steps=8, output=folder, display=Silence(), **more)


def test_a_resumed_run_keeps_its_choice_and_ends_with_the_same_weights(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "cut")
    interrupt_after(first, step=4)  # between two measurements
    first.train()
    rest = trainer(tmp_path / "cut", resume=True)
    rest.train()
    for (name, a), (_, b) in zip(
        whole.optimizer.engine.model.named_parameters(), rest.optimizer.engine.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    a, b = (lines(tmp_path / run / "metrics.jsonl") for run in ("whole", "cut"))
    assert [row["step"] for row in a if "importance" in row] == [0, 3, 6]
    assert [(row["loss"], row.get("importance"), row.get("decision")) for row in a] == [
        (row["loss"], row.get("importance"), row.get("decision")) for row in b
    ]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"top": 1, "by": "gradient_norm", "probes": 3}, "probes: not used by gradient_norm"),
        ({"top": 1, "by": "norm"}, "'gradient_norm' or 'sensitivity'"),
        ({"top": 0, "by": "sensitivity"}, "greater than or equal to 1"),
        ({"by": "sensitivity"}, "missing; this key is required"),
    ],
)
def test_what_cannot_be_is_said(layers, message):
    with pytest.raises(UserError) as error:
        HybridOptimizer(model(), token_losses, schedule=schedule(layers))
    assert message in str(error.value)


def test_norms_of_gradients_need_a_gradient():
    from hybrid_opt.objectives.contract import FunctionObjective

    own = HybridOptimizer(
        model(),
        FunctionObjective(token_losses, differentiable=False),
        schedule={
            **schedule({"top": 1, "by": "gradient_norm"}, {"es": 1}),
            "policy": [{"layers": {"top": 1, "by": "gradient_norm"}, "use": ["es"]}, {"match": ".*", "use": "frozen"}],
        },
    )
    with pytest.raises(UserError, match=r"policy.0.layers.by: gradient_norm needs an objective with a gradient"):
        own.step(BATCHES[0])
