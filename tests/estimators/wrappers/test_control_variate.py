"""Control variates: what they are written out, their mean and error in closed form, and that they leave nothing behind."""

import pytest
import torch

from hybrid_opt import HybridOptimizer
from hybrid_opt.config import load_run
from hybrid_opt.config.probing import EvolutionStrategy, Spsa
from hybrid_opt.config.wrappers import ControlVariate
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.es import EsEstimator
from hybrid_opt.estimators.spsa import SpsaEstimator
from hybrid_opt.estimators.wrappers.control_variate import ControlVariateEstimator
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import FunctionObjective
from hybrid_opt.planning.checking import cost_table, timeline
from tests.conftest import tiny_model, token_batch, token_losses
from tests.estimators.losses import near, quadratic, read_all

DENSE = {"type": "dense", "distribution": "gaussian"}
LOW_RANK = {"type": "low_rank", "noise_rank": 2}
LAZY = {"type": "lazy_subspace", "noise_rank": 2, "refresh": 3}
LAYER = {"type": "layer_subset", "layers": 1}
CAP = {"type": "norm_cap", "norm": 0.5}
NAMES = ["weight", "bias"]


def wrapper(**options):
    return {"type": "control_variate", "refresh": 5, "terms": 3, **options}


def hybrid(*wrappers, kind="spsa", **options):
    estimator = {"type": kind, "learning_rate": 1e-2, "wrappers": list(wrappers), **options}
    document = {"estimators": {"a": estimator}, "schedule": {"type": "single", "estimator": "a"}}
    return HybridOptimizer(tiny_model(), token_losses, schedule=document, seed=3)


def around_spsa(q=1, **options):
    perturbation = {"type": "dense", "distribution": "rademacher"}
    spsa = Spsa(type="spsa", learning_rate=1.0, sigma=0.1, pairs=q, perturbation=perturbation)
    return ControlVariateEstimator(SpsaEstimator(spsa), ControlVariate(**wrapper(**options)))


def weights(optimizer):
    return torch.cat([p.detach().flatten() for p in optimizer.engine.parameters.values()])


def write(engine, flat):
    for shard in engine.shards(engine.parameters):
        shard.data.copy_(flat[: len(shard.data)])
        flat = flat[len(shard.data) :]


def batch_of(step):
    return {**token_batch(), "input_ids": torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(step))}


INNER = {
    "low_rank": {"perturbation": LOW_RANK},
    "dense": {"perturbation": DENSE},
    "lazy_subspace": {"perturbation": LAZY},
    "layer_subset": {"inner": [LAYER]},
    "norm_cap": {"inner": [CAP]},
    "es": {"kind": "es", "population_size": 6, "antithetic": False},
    "fzoo": {"kind": "fzoo", "population_size": 3},
    "forward_gradient": {"kind": "forward_gradient"},
}


@pytest.mark.parametrize("options", INNER.values(), ids=INNER)
def test_it_is_what_it_says_written_out(options):
    """Two anchors of five steps and three terms at most, against a plain estimator at weights that are written."""
    inner = options.get("inner", [])
    options = {name: value for name, value in options.items() if name != "inner"}
    ours, plain = hybrid(*inner, wrapper(), **options), hybrid(*inner, **options)

    def estimated(flat, step):
        write(plain.engine, flat)
        estimate, _ = plain.estimators["a"].estimate(
            plain.engine, plain.objective, batch_of(step), list(plain.engine.parameters), StepKey(3, step, "a")
        )
        return read_all(plain.engine, estimate)

    for step in range(7):
        own = weights(ours)
        if step % 5 == 0:
            anchor, earlier = own, []
        expected, there = estimated(own, step), estimated(anchor, step)
        if earlier:
            expected = expected - there + torch.stack(earlier[-3:]).mean(dim=0)
        earlier.append(there)
        ours.step(batch_of(step))
        moved = weights(ours) - own
        assert (moved + 1e-2 * expected).norm() < 1e-3 * moved.norm(), step


def gradients(model, objective, batches):
    """The gradient of each batch's mean loss, (batches, n)."""
    rows = []
    for batch in batches:
        found = torch.autograd.grad(objective.losses(model, batch).mean(), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def error(u, q):
    """`E |1/q sum_j z_j z_j^T u_b - E u_b|^2` for Rademacher z and a random row u_b."""
    return ((1 + (u.shape[1] - 1) / q) * u.square().sum(dim=1).mean() - u.mean(dim=0).square().sum()).item()


def test_its_mean_is_the_gradient_and_its_error_that_of_the_closed_form():
    model, objective, rows = quadratic()
    batches = [{name: values[i : i + 1] for name, values in rows.items()} for i in range(4)]
    engine, q, terms, repeats = LocalEngine(model), 2, 2, 250
    anchor, away = torch.randn(2, 18, generator=torch.Generator().manual_seed(4))
    own = anchor + 0.4 * away
    write(engine, anchor)
    at_anchor = gradients(model, objective, batches)
    write(engine, own)
    at_weights = gradients(model, objective, batches)
    drawn = torch.randint(4, (repeats, terms + 1), generator=torch.Generator().manual_seed(6)).tolist()
    estimates = []
    for repeat, order in enumerate(drawn):
        estimator = around_spsa(q, terms=terms)
        write(engine, anchor)
        for step, number in enumerate(order):
            key = StepKey(repeat, step, "a")
            estimate, _ = estimator.estimate(engine, objective, batches[number], NAMES, key)
            write(engine, own)
        estimates.append(read_all(engine, estimate))
    estimates, gradient = torch.stack(estimates), at_weights.mean(dim=0)
    errors = (estimates - gradient).square().sum(dim=1)
    expected = error(at_weights - at_anchor, q) + error(at_anchor, q) / terms
    assert near(errors, expected)
    assert expected < 0.6 * error(at_weights, q)  # the plain estimate's
    assert (estimates.mean(dim=0) - gradient).square().sum() < 2 * expected / repeats


def test_the_first_step_of_an_anchor_is_a_plain_one():
    ours, plain = hybrid(wrapper(refresh=2)), hybrid()
    ours.step(token_batch())
    plain.step(token_batch())
    assert torch.equal(weights(ours), weights(plain))
    ours.step(token_batch())
    write(plain.engine, weights(ours))
    plain.signals = ours.signals
    assert [optimizer.step(batch_of(2)).costs["a"].forwards for optimizer in (ours, plain)] == [2, 2]
    assert torch.equal(weights(ours), weights(plain))


def test_other_parameters_have_an_anchor_of_their_own():
    model, objective, batch = quadratic()
    engine, estimator = LocalEngine(model), around_spsa()
    estimator.estimate(engine, objective, batch, NAMES, StepKey(1, 0, "a"))
    arguments = (engine, objective, batch, ["bias"], StepKey(1, 1, "a"))
    assert torch.equal(
        read_all(engine, estimator.estimate(*arguments)[0]), read_all(engine, estimator.inner.estimate(*arguments)[0])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("perturbation", [DENSE, LOW_RANK], ids=["dense", "low_rank"])
def test_weights_are_bitwise_what_they_were(dtype, perturbation):
    model = tiny_model().to(dtype)
    head, seen = model.lm_head.weight.data, []

    def losses(model, batch):
        seen.append(head.clone())
        return token_losses(model, batch)

    document = {"type": "spsa", "learning_rate": 0.1, "perturbation": perturbation, "wrappers": [wrapper()]}
    document = {"estimators": {"a": document}, "schedule": {"type": "single", "estimator": "a"}}
    ours = HybridOptimizer(model, losses, schedule=document, seed=3)
    first = head.clone()
    ours.step(token_batch())
    own, names = weights(ours), list(ours.engine.parameters)
    masters = [shard.data.clone() for shard in ours.engine.shards(names)]
    seen.clear()
    ours.estimators["a"].estimate(ours.engine, ours.objective, token_batch(), names, StepKey(3, 1, "a"))
    assert torch.equal(weights(ours), own)
    assert all(torch.equal(a.data, b) for a, b in zip(ours.engine.shards(names), masters, strict=True))
    if perturbation is LOW_RANK:  # whose evaluations write nothing themselves
        assert torch.equal(seen[0], head)
        assert torch.equal(seen[-1], first)
        assert not torch.equal(first, head)


def test_weights_are_put_back_where_an_evaluation_fails():
    model, objective, batch = quadratic()
    engine, estimator, calls = LocalEngine(model), around_spsa(), []
    estimator.estimate(engine, objective, batch, NAMES, StepKey(1, 0, "a"))
    own = torch.ones(18)
    write(engine, own)

    def failing(model, batch):
        calls.append(1)
        if len(calls) > 2:
            raise UserError("it fails at the anchor")
        return objective.losses(model, batch)

    with pytest.raises(UserError, match="at the anchor"):
        estimator.estimate(engine, FunctionObjective(failing), batch, NAMES, StepKey(1, 1, "a"))
    assert len(calls) > 2
    assert torch.equal(torch.cat([shard.data for shard in engine.shards(NAMES)]), own)


@pytest.mark.parametrize("inner", [(), (LAYER,), (CAP,)], ids=["plain", "layer_subset", "norm_cap"])
@pytest.mark.parametrize("perturbation", [DENSE, LOW_RANK, LAZY], ids=["dense", "low_rank", "lazy_subspace"])
def test_a_resumed_run_goes_on_bitwise(perturbation, inner, tmp_path):
    first = hybrid(*inner, wrapper(), perturbation=perturbation)
    for step in range(4):
        first.step(batch_of(step))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = hybrid(*inner, wrapper(), perturbation=perturbation)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(4, 7):
        for optimizer in (first, second):
            optimizer.step(batch_of(step))
        assert torch.equal(weights(first), weights(second)), step


def test_a_run_can_be_resumed_before_its_first_anchor():
    first, second = hybrid(wrapper()), hybrid(wrapper())
    second.load_state_dict(first.state_dict())
    assert second.estimators["a"].place is None
    for optimizer in (first, second):
        optimizer.step(token_batch())
    assert torch.equal(weights(first), weights(second))


def test_the_anchor_has_all_that_anybody_moves():
    document = {
        "estimators": {
            "a": {"type": "spsa", "learning_rate": 1e-2, "wrappers": [wrapper()]},
            "backprop": {"type": "backprop", "learning_rate": 1e-2},
        },
        "policy": [
            {"match": "norm", "use": "frozen"},
            {"match": "layers.0", "use": ["a"]},
            {"match": ".", "use": ["backprop"]},
        ],
        "schedule": {"type": "alternate", "pattern": {"a": 1, "backprop": 1}},
    }
    ours = HybridOptimizer(tiny_model(), token_losses, schedule=document)
    start = {name: p.detach().clone() for name, p in ours.engine.parameters.items()}
    for step in range(3):
        ours.step(batch_of(step))
    anchor = ours.estimators["a"].anchor
    assert set(anchor) == {name for name in start if "norm" not in name}
    assert all(torch.equal(anchor[name], start[name]) for name in anchor)
    assert not torch.equal(start["lm_head.weight"], ours.engine.parameters["lm_head.weight"])


def test_members_that_are_equally_good_leave_the_other_terms():
    model, objective, batch = quadratic()
    engine = LocalEngine(model)
    options = {"population_size": 6, "sigma": 0.1, "perturbation": DENSE}
    es = EsEstimator(EvolutionStrategy(type="es", learning_rate=1.0, **options))
    estimator = ControlVariateEstimator(es, ControlVariate(**wrapper()))
    earlier = read_all(engine, estimator.estimate(engine, objective, batch, NAMES, StepKey(1, 0, "a"))[0])
    flat = FunctionObjective(lambda model, batch: 0.0 * model(batch["x"]).sum(1))
    estimate, cost = estimator.estimate(engine, flat, batch, NAMES, StepKey(1, 1, "a"))
    assert torch.allclose(read_all(engine, estimate), earlier)
    assert not cost.is_empty
    assert cost.statistics["skipped"] == 0


@pytest.mark.parametrize(("kind", "forwards"), [("spsa", 2), ("es", 16), ("fzoo", 9), ("forward_gradient", 1)])
def test_a_step_costs_two_evaluations_and_an_anchors_first_costs_one(kind, forwards):
    ours = hybrid(wrapper(refresh=2), kind=kind)
    costs = [ours.step(token_batch()).costs["a"] for _ in range(4)]
    assert [cost.forwards for cost in costs] == [forwards, 2 * forwards] * 2
    assert costs[1].forward_equivalents == 2 * costs[0].forward_equivalents
    assert costs[1].tokens == 2 * costs[0].tokens
    assert ours.config.estimators["a"].forwards_a_step == 2 * forwards


def test_what_is_told_of_its_cost(write_run):
    spsa = {"type": "spsa", "pairs": 3, "learning_rate": 1e-2, "wrappers": [wrapper()]}
    document = {"estimators": {"a": spsa}, "schedule": {"type": "single", "estimator": "a"}}
    table = cost_table(load_run(write_run(schedule=document)))
    (row,) = zip(*(column.cells for column in table.columns), strict=True)
    assert row[1] == "12"
    assert "control_variate" in row[4]
    phase = {
        "tokens": 8192,
        "schedule": document["schedule"],
    }  # four evaluations of six forward passes of 4 examples of 32 tokens
    phases = {"type": "phases", "phases": [phase, {"schedule": document["schedule"]}]}
    run = load_run(write_run(schedule={**document, "schedule": phases}))
    assert next(iter(timeline(run, 8))).plain.split()[:4] == ["steps", "0", "to", "5"]
    ours = hybrid(wrapper())
    ours.step(token_batch())
    shapes = {name: tuple(p.shape) for name, p in ours.engine.parameters.items()}
    anchor = sum(w.nbytes for w in ours.estimators["a"].anchor.values())
    assert ours.config.estimators["a"].keeps(shapes)["control_variate"] == 2 * anchor


@pytest.mark.parametrize(
    ("wrappers", "options", "message"),
    [
        ([{"type": "relative_sigma"}], {}, "those of relative_sigma depend on more .*take control_variate off"),
        ([], {"perturbation": {**LOW_RANK, "otherwise": "frozen"}}, "those of spsa depend on more"),
        ([], {"kind": "guided"}, "those of guided depend on more"),
        ([], {"kind": "stale_gradient"}, "those of stale_gradient depend on more"),
        ([{"type": "momentum"}], {}, r"momentum and control_variate both .*update: \{type: momentum\}"),
        (
            [],
            {"kind": "fzoo", "reuse": True, "population_size": 4},
            "control_variate made at other weights; write reuse",
        ),
    ],
)
def test_what_it_does_not_go_with(wrappers, options, message):
    with pytest.raises(UserError, match=message):
        hybrid(*wrappers, wrapper(), **options)


def test_layers_are_chosen_within_it():
    with pytest.raises(UserError, match="write layer_subset before control_variate"):
        hybrid(wrapper(), LAYER)


def test_deepspeeds_weights_are_refused(monkeypatch):
    monkeypatch.setattr(LocalEngine, "layout", lambda self: {"ranks": 2, "zero_stage": 2})
    with pytest.raises(UserError, match=r"zero_stage: 2 has DeepSpeed hold it; write engine: \{type: local\}"):
        hybrid(wrapper())
