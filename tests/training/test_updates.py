"""Estimators that take turns: warm-up, memories over a rest, and updates no longer than backprop's; against traces by hand."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hybrid_opt import HybridOptimizer, UserError
from hybrid_opt.config.loading import load_schedule
from hybrid_opt.display.progress import Silence
from hybrid_opt.engines.ranks import Ranks
from hybrid_opt.recovery.checkpoint import load_checkpoint, save_checkpoint
from hybrid_opt.training.trainer import Trainer
from tests.conftest import interrupt_after, tiny_model, token_batch, token_losses
from tests.training.test_trainer import lines

ES = {"type": "es", "population_size": 8, "learning_rate": 0.05, "fitness_shaping": "none", "sigma": 1e-3}
SGD = {"type": "backprop", "optimizer": "SGD", "learning_rate": 0.1}
ADAMW = {"type": "backprop", "learning_rate": 1e-2}
MOMENTUM = {"type": "momentum", "beta": 0.5}
STALE = {"type": "stale_gradient", "learning_rate": 1.0}


class Point(nn.Module):
    """Backprop's w, and v for others; the loss is `|w|^2 / 2 + |v|^2 / 2`, so gradients are the weights."""

    def __init__(self, *w: float):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.ones(2))


def bowl(model: nn.Module, batch) -> torch.Tensor:
    return (model.w.square().sum() + model.v.square().sum()).view(1) / 2


def hybrid(pattern: dict, model: nn.Module | None = None, losses=token_losses, policy=None, **estimators):
    turns = {"type": "alternate", "pattern": pattern}
    file = {"estimators": estimators, "schedule": turns, **({"policy": policy} if policy else {})}
    return HybridOptimizer(model or tiny_model(), losses, schedule=file, seed=3)


def on_a_point(pattern: dict, *w: float, **estimators) -> HybridOptimizer:
    """The others move w too, and nobody v."""
    policy = [{"match": "w", "use": list(estimators)}, {"match": "v", "use": "frozen"}]
    return hybrid(pattern, Point(*w), bowl, policy, **estimators)


def weights_of(optimizer: HybridOptimizer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in optimizer.engine.parameters.items()}


def moved(optimizer: HybridOptimizer) -> tuple[float, dict]:
    """Length of a step, and its report."""
    before = weights_of(optimizer)
    report = optimizer.step(token_batch())
    after = weights_of(optimizer)
    return sum((after[name] - w).double().square().sum().item() for name, w in before.items()) ** 0.5, report


def assert_equal(one: HybridOptimizer, other: HybridOptimizer) -> None:
    for name, weights in weights_of(one).items():
        assert torch.equal(weights, weights_of(other)[name]), name


# ------------------------------------------------------------ warm-up


def test_the_learning_rate_rises_in_every_turn_after_a_rest():
    backprop = {**SGD, "warmup_after_switch": 2}
    stale = {**STALE, "warmup_after_switch": 4}
    optimizer = on_a_point({"backprop": 2, "stale": 3}, 1.0, backprop=backprop, stale=stale)
    rates = [optimizer.step(None).learning_rates for _ in range(8)]
    expected = [0.1, 0.1, 0.25, 0.5, 0.75, 0.05, 0.1, 0.25]
    assert [rate for step in rates for rate in step.values()] == expected
    w = gradient = 1.0
    for step, rate in enumerate(expected):  # what stale gradients take off is the gradient of the latest backprop step
        gradient = w if step in (0, 1, 5, 6) else gradient
        w -= rate * gradient
    assert optimizer.engine.parameters["w"].item() == pytest.approx(w, rel=1e-6)


def test_it_is_a_share_of_the_scheduled_rate():
    es = {**ES, "learning_rate_schedule": "linear", "warmup_after_switch": 2}
    turns = {"type": "alternate", "pattern": {"backprop": 1, "es": 2}}
    schedule = {"estimators": {"es": es, "backprop": ADAMW}, "schedule": turns}
    optimizer = HybridOptimizer(tiny_model(), token_losses, schedule=schedule, steps=10)
    rates = [optimizer.step(token_batch()).learning_rates.get("es") for _ in range(6)]
    assert rates == [None, *(pytest.approx(0.05 * share) for share in (0.9 / 2, 0.8)), None, *(pytest.approx(0.05 * s) for s in (0.6 / 2, 0.5))]  # fmt: skip


# ------------------------------------------------------------ memories over a rest


@pytest.mark.parametrize(("how", "kept"), [("keep", 1.0), ("decay", 0.5**2), ("reset", 0.0)])
def test_momentum_over_a_rest_of_two_steps(how, kept):
    stale = {**STALE, "learning_rate": 0.1, "update": MOMENTUM, "state_on_switch": how}
    optimizer = on_a_point({"backprop": 2, "stale": 2}, 1.0, backprop=SGD, stale=stale)
    w, m = 1.0, 0.0
    for step in range(12):
        optimizer.step(None)
        if step % 4 < 2:
            gradient = w
            w -= 0.1 * gradient
        else:
            m = 0.5 * m * (kept if step % 4 == 2 else 1) + gradient
            w -= 0.1 * m
        assert optimizer.engine.parameters["w"].item() == pytest.approx(w, rel=1e-5), step


@pytest.mark.parametrize("how", ["keep", "decay", "reset"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_optimizers_state_over_a_rest_of_three_steps(name, how):
    """ES moves v alone, so w goes the way of a torch loop."""
    arguments = {"momentum": 0.8} if name == "SGD" else {"betas": [0.6, 0.8], "weight_decay": 0.0}
    backprop = {**SGD, "optimizer": name, "optimizer_arguments": arguments, "state_on_switch": how}
    policy = [{"match": "w", "use": ["backprop"]}, {"match": "v", "use": ["es"]}]
    es = {**ES, "perturbation": {"type": "dense"}}
    optimizer = hybrid({"backprop": 2, "es": 3}, Point(1.0, -2.0), bowl, policy, backprop=backprop, es=es)
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    make = lambda: getattr(torch.optim, name)([w], lr=0.1, **arguments)  # noqa: E731
    reference = make()
    for step in range(13):
        optimizer.step(None)
        if step % 5 < 2:
            reference = make() if step % 5 == 0 and how == "reset" else reference
            w.grad = w.detach().clone()
            reference.step()
        elif how == "decay":
            where, w.grad = w.detach().clone(), torch.zeros(2)
            reference.step()
            w.data.copy_(where)
        torch.testing.assert_close(optimizer.engine.parameters["w"], w, msg=lambda m, step=step: f"step {step}: {m}")


def test_a_step_that_finds_nothing_is_no_rest():
    """All members are equally good in it, so nothing is applied."""
    es = {**ES, "update": MOMENTUM, "state_on_switch": "reset"}
    optimizer = hybrid({"es": 4}, es=es)
    optimizer.step(token_batch())
    before = {key: m.clone() for key, m in optimizer.updates.memories()["es"].items()}
    assert optimizer.step(lambda: torch.ones(2)).costs["es"].is_empty
    assert all(torch.equal(m, before[key]) for key, m in optimizer.updates.memories()["es"].items())
    optimizer.step(token_batch())
    kept = hybrid({"es": 4}, es={**es, "state_on_switch": "keep"})
    for batch in (token_batch(), lambda: torch.ones(2), token_batch()):
        kept.step(batch)
    assert_equal(optimizer, kept)


# ------------------------------------------------------------ trust


@pytest.mark.parametrize("update", [{"type": "sgd"}, MOMENTUM, {"type": "adam"}])
@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_no_update_is_longer_than_trust_says(update, anchor):
    """Backprop moves (3, 4) by a tenth of it, 0.5; a stale gradient would go much further."""
    stale = {**STALE, "trust": 0.5, "update": update, "anchor": anchor}
    optimizer = on_a_point({"backprop": 1, "stale": 3}, 3.0, 4.0, backprop=SGD, stale=stale)
    length, _ = moved(optimizer)
    assert length == pytest.approx(0.5, rel=1e-6)
    for _ in range(3):
        length, report = moved(optimizer)
        factor = report.costs["stale"].statistics["trust_factor"]
        assert length == pytest.approx(0.25, rel=1e-5)
        assert report.learning_rates["stale"] == factor < 1
    if update["type"] == "sgd" and not anchor:
        assert factor == pytest.approx(0.05, rel=1e-6)  # 0.25 of 5
        assert optimizer.engine.parameters["w"].tolist() == pytest.approx([3 * 0.75, 4 * 0.75], rel=1e-6)


def test_a_short_update_is_left_alone_bitwise():
    free = hybrid({"backprop": 1, "es": 2}, backprop=ADAMW, es=ES)
    trusting = hybrid({"backprop": 1, "es": 2}, backprop=ADAMW, es={**ES, "trust": 1e6})
    for _ in range(6):
        free.step(token_batch())
        statistics = {name: cost.statistics for name, cost in trusting.step(token_batch()).costs.items()}
    assert statistics["es"]["trust_factor"] == 1
    assert_equal(free, trusting)


def test_before_backprop_has_moved_anything_nothing_is_limited():
    backprop = {**SGD, "learning_rate_schedule": "constant_with_warmup", "warmup_steps": 5}
    optimizer = on_a_point({"stale": 1, "backprop": 1}, 3.0, 4.0, backprop=backprop, stale={**STALE, "trust": 0.5})
    assert optimizer.updates.trust.latest is None
    with optimizer.updates.trust.measured(["w"]):
        pass  # as where loss scaling skips the step
    assert optimizer.updates.trust.latest is None
    optimizer.step(None)
    _, report = moved(optimizer)
    assert report.learning_rates["backprop"] == pytest.approx(0.02)
    assert optimizer.updates.trust.latest == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("update", [{"type": "sgd"}, {"type": "adam"}])
def test_es_keeps_to_the_length_of_the_latest_backprop_step(update):
    es = {**ES, "learning_rate": 3.0, "trust": 0.3, "update": update}
    optimizer = hybrid({"es": 2, "backprop": 2}, backprop=ADAMW, es=es)
    lengths, factors = zip(*((length, report.costs) for length, report in (moved(optimizer) for _ in range(10))), strict=True)  # fmt: skip
    factors = [costs["es"].statistics["trust_factor"] if "es" in costs else None for costs in factors]
    assert factors[:2] == [1, 1]
    assert min(lengths[:2]) > 10 * lengths[3]
    for step in (4, 5, 8, 9):
        assert factors[step] < 0.1
        assert lengths[step] == pytest.approx(0.3 * lengths[step - step % 4 - 1], rel=1e-4)


# ------------------------------------------------------------ resumed, and taken again

COUPLED = {
    "backprop": {**ADAMW, "state_on_switch": "decay", "warmup_after_switch": 2},
    "es": {**ES, "state_on_switch": "decay", "update": MOMENTUM, "trust": 0.1, "warmup_after_switch": 3},
    "spsa": {"type": "spsa", "learning_rate": 1e-3, "state_on_switch": "reset", "update": {"type": "adam"}, "trust": 2.0},
}  # fmt: skip
PATTERN = {"backprop": 2, "es": 2, "spsa": 1}


def test_a_resumed_run_is_the_whole_one(tmp_path):
    def trainer(folder, **more) -> Trainer:
        schedule = {"estimators": COUPLED, "schedule": {"type": "alternate", "pattern": PATTERN}}
        options = {"schedule": schedule, "steps": 11, "output": folder, "display": Silence(), **more}
        return Trainer(tiny_model(), token_losses, [token_batch()], **options)

    trainer(tmp_path / "whole").train()
    rows = lines(tmp_path / "whole/metrics.jsonl")
    assert any(row["parts"]["es"]["statistics"]["trust_factor"] < 1 for row in rows if "es" in row["estimators"])
    whole = load_file(tmp_path / "whole/model/model.safetensors")
    for stop in (1, 3, 6, 7):
        folder = tmp_path / str(stop)
        interrupted = trainer(folder)
        interrupt_after(interrupted, step=stop)
        assert not interrupted.train().finished
        trainer(folder, resume=True).train()
        again = load_file(folder / "model/model.safetensors")
        assert all(torch.equal(again[name], weights) for name, weights in whole.items()), stop
        kept = [(row["loss"], row["learning_rates"]) for row in lines(folder / "metrics.jsonl")]
        assert kept == [(row["loss"], row["learning_rates"]) for row in rows]


def test_records_bring_back_every_bit_and_light_checkpoints_what_couples(tmp_path):
    """Two turns of estimators without a gradient, from the weights after the backprop steps before them."""
    trained, again = hybrid(PATTERN, **COUPLED), hybrid(PATTERN, **COUPLED)
    for _ in range(7):
        trained.step(token_batch())
    whole = save_checkpoint(tmp_path / "whole", 7, Ranks(), lambda place: trained.state_dict())
    reports = [trained.step(token_batch()) for _ in range(3)]
    documents = json.loads(json.dumps([report.record.document(trained.engine) for report in reports]))
    assert [document["parts"][0].get("rested") for document in documents] == [3, None, 4]
    light = save_checkpoint(tmp_path / "light", 10, Ranks(), lambda place: trained.state_dict(weights=False), base=7)
    again.load_state_dict(load_checkpoint(whole))
    for document in documents:
        again.replay(document)
    assert_equal(trained, again)
    again.load_state_dict(load_checkpoint(light))
    for _ in range(6):
        assert trained.step(token_batch()).learning_rates == again.step(token_batch()).learning_rates
    assert_equal(trained, again)


def test_a_roll_back_puts_back_the_measure_and_leaves_the_turns():
    optimizer = hybrid({"backprop": 1, "es": 2}, backprop=ADAMW, es={**ES, "trust": 0.1})
    optimizer.step(token_batch())
    best = optimizer.state_dict()
    optimizer.step(token_batch())
    optimizer.skip_step()
    optimizer.step(token_batch())
    assert optimizer.updates.trust.latest != best["updates"]["latest_change"] > 0
    optimizer.roll_back(best)
    assert optimizer.updates.trust.latest == best["updates"]["latest_change"]
    assert optimizer.updates.turns.state_dict() == {
        "acted": {"backprop": 1, "es": 0},
        "rested": {"backprop": 0, "es": 1},
    }


# ------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("estimators", "message"),
    [
        ({"es": {**ES, "state_on_switch": "decay"}}, "es: state_on_switch: decay: update: sgd keeps no state; write update: {type: momentum} or adam"),
        ({"es": ES, "backprop": {**SGD, "state_on_switch": "reset"}}, r"backprop: state_on_switch: reset: SGD keeps no state; write optimizer_arguments: {momentum: 0.9}"),
        ({"es": ES, "backprop": {**SGD, "optimizer": "RMSprop", "state_on_switch": "decay"}}, "nothing is known of how RMSprop's state decays; write reset"),
        ({"es": {**ES, "trust": 0.5}}, "estimators.es.trust compares updates with backprop's, but no backprop estimator acts; drop it"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(estimators, message):
    pattern = dict.fromkeys(estimators, 1)
    with pytest.raises(UserError, match=message):
        load_schedule({"estimators": estimators, "schedule": {"type": "alternate", "pattern": pattern}})


def test_trust_in_a_blend_needs_parameters_of_its_own():
    blend = {"type": "blend", "weights": {"es": 1.0, "backprop": 1.0}}
    file = {"estimators": {"es": {**ES, "trust": 0.5}, "backprop": SGD}, "schedule": blend}
    with pytest.raises(
        UserError, match=r"estimators.es.trust: 'es' acts in the same steps as backprop on the same parameters"
    ):
        HybridOptimizer(tiny_model(), token_losses, schedule=file)
    policy = [{"match": "mlp", "use": ["es"]}, {"match": ".*", "use": ["backprop"]}]
    optimizer = HybridOptimizer(tiny_model(), token_losses, schedule={**file, "policy": policy})
    factors = [optimizer.step(token_batch()).costs["es"].statistics["trust_factor"] for _ in range(2)]
    assert factors[0] == 1 > factors[1]
