"""The step against hand-written loops, and the same step in other people's loops."""

import pytest
import torch
from torch import nn

from hybrid_opt import HybridOptimizer, UserError
from tests.conftest import tiny_model, token_batch, token_losses

ES = {"type": "es", "population_size": 4, "sigma": 0.01, "learning_rate": 0.01, "fitness_shaping": "none"}
ADAMW = {"type": "backprop", "optimizer": "AdamW", "learning_rate": 1e-3, "optimizer_arguments": {"weight_decay": 0.1}}


def schedule(kind: dict, **policy) -> dict:
    return {"estimators": {"es": ES, "backprop": ADAMW}, "schedule": kind, **policy}


def batches(count: int):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        ids = torch.randint(0, 64, (4, 9), generator=generator)
        yield {"input_ids": ids, "position_ids": torch.arange(9).repeat(4, 1)}


def weights_after(plan: dict, steps: int = 5, **options) -> dict[str, torch.Tensor]:
    model = tiny_model()
    hybrid = HybridOptimizer(model, token_losses, schedule=plan, **options)
    for batch in batches(steps):
        hybrid.step(batch)
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_equal(one, two):
    assert all(torch.equal(one[name], two[name]) for name in one)


BACKPROP_ONLY = schedule({"type": "single", "estimator": "backprop"})


def test_backprop_alone_is_a_torch_loop_bitwise():
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for batch in batches(5):
        optimizer.zero_grad()
        token_losses(model, batch).mean().backward()
        optimizer.step()
    assert_equal(weights_after(BACKPROP_ONLY), {name: p.detach() for name, p in model.named_parameters()})


def test_a_blend_whose_es_weight_is_0_is_backprop_alone_bitwise():
    blend = schedule({"type": "blend", "weights": {"es": 0.0, "backprop": 1.0}})
    assert_equal(weights_after(blend), weights_after(BACKPROP_ONLY))


def test_a_blend_gives_the_optimizer_the_weighted_sum():
    plan = schedule({"type": "blend", "weights": {"es": 0.25, "backprop": 0.5}})
    plan["estimators"]["backprop"] = {"type": "backprop", "optimizer": "SGD", "learning_rate": 0.1}
    model = tiny_model()
    hybrid = HybridOptimizer(model, token_losses, schedule=plan)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = next(batches(1))
    token_losses(model, batch).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    from hybrid_opt import Key

    estimate, _ = hybrid.estimators["es"].estimate(
        hybrid.engine, hybrid.objective, batch, list(before), Key((0, 0)).fold("es")
    )
    es = {shard.name: estimate.read(shard).view(shard.shape) for shard in hybrid.engine.shards(before)}
    report = hybrid.step(batch)
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] - 0.1 * (0.5 * gradients[name] + 0.25 * es[name]), atol=1e-6), name
    assert report.weights == {"es": 0.25, "backprop": 0.5}
    assert report.loss == report.costs["backprop"].loss


@pytest.mark.parametrize(
    "kind",
    [
        {"type": "alternate", "pattern": {"es": 2, "backprop": 1}},
        {"type": "blend", "weights": {"es": 0.5, "backprop": 0.5}},
        {"type": "phases", "phases": [
            {"steps": 2, "schedule": {"type": "single", "estimator": "es"}},
            {"schedule": {"type": "single", "estimator": "backprop"}},
        ]},
    ],
    ids=lambda kind: kind["type"],
)  # fmt: skip
def test_two_runs_with_one_seed_are_identical_and_another_seed_differs(kind):
    one, two = weights_after(schedule(kind), seed=1), weights_after(schedule(kind), seed=1)
    assert_equal(one, two)
    other = weights_after(schedule(kind), seed=2)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_frozen_parameters_never_move_and_others_do():
    policy = [
        {"match": r"layers\.0", "use": "frozen"},
        {"match": "norm", "use": ["es"]},
        {"match": ".*", "use": ["es", "backprop"]},
    ]
    plan = schedule({"type": "alternate", "pattern": {"es": 1, "backprop": 1}}, policy=policy)
    start = {name: p.detach().clone() for name, p in tiny_model().named_parameters()}
    after = weights_after(plan, steps=2)
    for name in start:
        assert torch.equal(after[name], start[name]) == ("layers.0" in name), name


def test_phases_change_the_policy():
    es_on_norms = {"steps": 1, "schedule": {"type": "single", "estimator": "es"}, "policy": [
        {"match": "norm", "use": ["es"]}, {"match": ".*", "use": "frozen"}]}  # fmt: skip
    plan = schedule({"type": "phases", "phases": [es_on_norms, {"schedule": {"type": "single", "estimator": "es"}}]})
    start = {name: p.detach().clone() for name, p in tiny_model().named_parameters()}
    first, second = weights_after(plan, steps=1), weights_after(plan, steps=2)
    for name in start:
        assert torch.equal(first[name], start[name]) == ("norm" not in name), name
        assert not torch.equal(second[name], first[name]), name


def test_an_estimator_is_only_checked_for_what_it_moves_when_it_acts():
    """ES never acts in the first phase, so what it could not evaluate there does not matter."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.ones(2)), nn.Linear(2, 1)

        def forward(self, x):
            return self.layer(x * self.scale)

    only_layer = [{"match": "layer", "use": ["es"]}, {"match": ".*", "use": "frozen"}]
    plan = schedule({"type": "phases", "phases": [
        {"steps": 1, "schedule": {"type": "single", "estimator": "backprop"}},
        {"schedule": {"type": "single", "estimator": "es"}, "policy": only_layer},
    ]})  # fmt: skip
    hybrid = HybridOptimizer(Scaled(), lambda model, x: model(x).pow(2).sum(1), schedule=plan)
    assert [list(hybrid.step(torch.ones(3, 2)).weights) for _ in range(2)] == [["backprop"], ["es"]]
    plan["schedule"]["phases"][1].pop("policy")
    with pytest.raises(UserError, match="for parameter scale because it belongs to a Scaled module"):
        HybridOptimizer(Scaled(), lambda model, x: model(x).pow(2).sum(1), schedule=plan)


def test_frozen_parameters_have_no_master_weights():
    plan = schedule({"type": "single", "estimator": "es"}, policy=[
        {"match": "norm", "use": ["es"]}, {"match": ".*", "use": "frozen"}])  # fmt: skip
    hybrid = HybridOptimizer(tiny_model().bfloat16(), token_losses, schedule=plan)
    assert all("norm" in name for name in hybrid.engine.masters)
    before = {name: p.detach().clone() for name, p in hybrid.engine.model.named_parameters()}
    hybrid.step(token_batch())
    for name, p in hybrid.engine.model.named_parameters():
        assert "norm" in name or torch.equal(p, before[name])


def test_es_steps_leave_the_optimizers_moments_alone_in_alternate():
    model = tiny_model()
    hybrid = HybridOptimizer(
        model, token_losses, schedule=schedule({"type": "alternate", "pattern": {"backprop": 1, "es": 2}})
    )
    stream = batches(3)
    hybrid.step(next(stream))
    moments = [s["exp_avg"].clone() for s in hybrid.engine.optimizer.state.values()]
    hybrid.step(next(stream))
    hybrid.step(next(stream))
    after = [s["exp_avg"] for s in hybrid.engine.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


@pytest.mark.parametrize("perturbation", ["dense", "low_rank"])
@pytest.mark.parametrize("as_mean", [False, True])
def test_a_closure_gives_the_same_weights_as_a_batch(perturbation, as_mean):
    plan = schedule({"type": "alternate", "pattern": {"es": 1, "backprop": 1}})
    plan["estimators"]["es"] = {**ES, "perturbation": {"type": perturbation}}
    by_batch, by_closure = tiny_model(), tiny_model()
    one = HybridOptimizer(by_batch, token_losses, schedule=plan)
    two = HybridOptimizer(by_closure, schedule=plan)
    for batch in batches(4):
        one.step(batch)
        two.step(
            lambda batch=batch: token_losses(by_closure, batch).mean() if as_mean else token_losses(by_closure, batch)
        )
    for p, q in zip(by_batch.parameters(), by_closure.parameters(), strict=True):
        # Es estimates divide differences of losses by sigma, so rounding of a mean shows at 1e-7 / sigma.
        assert torch.allclose(p, q, rtol=0, atol=2e-5)


def test_any_module_learns():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(64, 6)
    y = torch.tanh(x[:, :1] - x[:, 1:2])

    def losses(model, batch):
        return (model(batch[0]) - batch[1]).pow(2).sum(1)

    plan = schedule({"type": "alternate", "pattern": {"es": 4, "backprop": 1}})
    plan["estimators"]["es"] = {**ES, "learning_rate": 0.05, "population_size": 16}
    plan["estimators"]["backprop"] = {"type": "backprop", "optimizer": "SGD", "learning_rate": 0.05}
    hybrid = HybridOptimizer(model, losses, schedule=plan)
    seen = [hybrid.step((x, y)).loss for _ in range(150)]
    assert seen[-1] < 0.5 * seen[0]


def test_state_can_be_saved_and_put_back_in_the_middle():
    plan = schedule({"type": "alternate", "pattern": {"es": 2, "backprop": 1}})
    plan["estimators"]["es"] = {**ES, "update": {"type": "adam"}}
    stream = list(batches(6))
    whole, first, second = tiny_model(), tiny_model(), tiny_model()
    hybrid = HybridOptimizer(whole, token_losses, schedule=plan)
    for batch in stream:
        hybrid.step(batch)
    begun = HybridOptimizer(first, token_losses, schedule=plan)
    for batch in stream[:4]:
        begun.step(batch)
    resumed = HybridOptimizer(second, token_losses, schedule=plan)
    resumed.load_state_dict(begun.state_dict())
    for batch in stream[4:]:
        resumed.step(batch)
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    assert resumed.signals.step == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": 3}, "expected losses"),
        ({"schedule": schedule({"type": "single", "estimator": "es"}, policy=[{"match": ".*", "use": ["backprop"]}])},
         "'es' acts, but no rule lets it move any parameter"),
        ({"schedule": {"estimators": {"es": {**ES, "learning_rate_schedule": "linear"}},
                       "schedule": {"type": "single", "estimator": "es"}}}, "depends on the number of steps of the run"),
    ],
)  # fmt: skip
def test_mistakes_when_building(arguments, message):
    with pytest.raises(UserError, match=message):
        HybridOptimizer(**{"model": tiny_model(), "objective": token_losses, "schedule": BACKPROP_ONLY, **arguments})


@pytest.mark.parametrize(
    ("objective", "batch", "message"),
    [
        (None, token_batch(), "none was given"),
        (lambda model, batch: token_losses(model, batch).mean(), token_batch(), "must return one loss an example"),
        (token_losses, lambda: 3.0, "must return losses"),
        (lambda model, batch: token_losses(model, batch) * float("inf"), token_batch(),
         "step 0, estimator backprop: the loss is inf; lower the learning rates"),
    ],
)  # fmt: skip
def test_mistakes_when_stepping(objective, batch, message):
    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match=message):
        HybridOptimizer(model, objective, schedule=BACKPROP_ONLY).step(batch)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda found: {}, "it is not what HybridOptimizer.state_dict gave: it has no 'setup', but nothing"),
        (lambda found: {"weight": 1}, "it has no 'setup', but weight"),
        (lambda found: found | {"setup": {**found["setup"], "seed": 5}}, "because seed was 5 and is now 0"),
        (
            lambda found: found | {"engine": {**found["engine"], "weights": {}}},
            "has no values there, and [0-9]+ in this model",
        ),
    ],
)
def test_a_state_of_something_else_is_refused(state, message):
    optimizer = HybridOptimizer(tiny_model(), token_losses, schedule="alternate")
    with pytest.raises(UserError, match=message):
        optimizer.load_state_dict(state(optimizer.state_dict()))


def test_a_closure_that_goes_backwards_is_told_so():
    net = tiny_model()
    optimizer = HybridOptimizer(net, schedule="es_only")
    with pytest.raises(UserError, match="seems to call backward"):
        optimizer.step(lambda: token_losses(net, token_batch()).mean().backward())
