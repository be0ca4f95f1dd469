"""The latest gradient once more, against the same steps written out with torch."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybrid_opt import HybridOptimizer, Trainer, load_run
from hybrid_opt.display.progress import Silence
from hybrid_opt.engines.local import Gradients, LocalEngine
from hybrid_opt.estimators.followers import Followers
from hybrid_opt.estimators.stale_gradient import StaleGradientEstimator
from hybrid_opt.planning.checking import timeline
from tests.conftest import interrupt_after, tiny_model, token_batch, token_losses

A, B = 0.5, 0.2
SGD = {"type": "backprop", "optimizer": "SGD", "learning_rate": A}
STALE = {"type": "stale_gradient", "learning_rate": B}
ES = {"type": "es", "population_size": 2, "learning_rate": 1e-3, "fitness_shaping": "none"}
TURNS = {"type": "alternate", "pattern": {"backprop": 1, "stale": 2}}


def schedule(kind: dict, *, backprop: dict = SGD, stale: dict = STALE, **policy) -> dict:
    return {"estimators": {"backprop": backprop, "stale": stale}, "schedule": kind, **policy}


def weights(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradient_at(place: dict[str, Tensor]) -> dict[str, Tensor]:
    model = tiny_model()
    model.load_state_dict(place, strict=False)
    token_losses(model, token_batch()).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def stepped(kind: dict, steps: int, **options):
    """A HybridOptimizer after some steps on the same batch, the reports, and the weights before and after each step."""
    model = tiny_model()
    hybrid, reports, seen = (
        HybridOptimizer(model, token_losses, schedule=schedule(kind, **options)),
        [],
        [weights(model)],
    )
    for _ in range(steps):
        reports.append(hybrid.step(token_batch()))
        seen.append(weights(model))
    return hybrid, reports, seen


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor]):
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("clipping", [None, 1e3])
def test_turns_move_the_weights_along_one_gradient(clipping):
    _, reports, seen = stepped(TURNS, 3, backprop={**SGD, "gradient_clipping": clipping})
    g = gradient_at(seen[0])
    assert_near(seen[3], {name: w - (A + 2 * B) * g[name] for name, w in seen[0].items()})
    assert max((seen[3][name] - w).abs().max() for name, w in seen[0].items()) > 0.1
    assert [report.loss is None for report in reports] == [False, True, True]


def test_the_gradient_is_that_before_clipping():
    _, _, seen = stepped(TURNS, 2, backprop={**SGD, "gradient_clipping": 1e-6})
    g = gradient_at(seen[0])
    assert_near(seen[2], {name: w - B * g[name] for name, w in seen[1].items()})


def test_the_next_gradient_takes_the_place_of_the_one_before():
    _, _, seen = stepped(TURNS, 5)
    g = gradient_at(seen[3])
    assert_near(seen[5], {name: w - (A + B) * g[name] for name, w in seen[3].items()})


def test_the_adam_rule_is_torchs_adam_on_the_same_gradient():
    rate = 1e-2
    stale = {**STALE, "learning_rate": rate, "update": {"type": "adam", "beta1": 0.8, "epsilon": 1e-4}}
    _, _, seen = stepped(TURNS, 3, stale=stale)
    g, parameters = gradient_at(seen[0]), {name: torch.nn.Parameter(w.clone()) for name, w in seen[1].items()}
    adam = torch.optim.Adam(parameters.values(), lr=rate, betas=(0.8, 0.999), eps=1e-4)
    for name, p in parameters.items():
        p.grad = g[name]
    adam.step()
    adam.step()
    assert_near(seen[3], {name: p.detach() for name, p in parameters.items()})


def test_before_the_first_gradient_nothing_moves_and_a_step_costs_nothing():
    hybrid, reports, seen = stepped({"type": "alternate", "pattern": {"stale": 2, "backprop": 1}}, 2)
    assert all(torch.equal(seen[2][name], w) for name, w in seen[0].items())
    cost = reports[1].costs["stale"]
    assert (cost.loss, cost.forwards, cost.backwards, cost.forward_equivalents, cost.tokens) == (None, 0, 0, 0.0, 0)
    assert (reports[1].loss, reports[1].tokens) == (None, 0)
    assert (hybrid.signals.step, hybrid.signals.loss, hybrid.signals.forwards, hybrid.signals.tokens) == (2, None, 0, 0)


def test_in_a_blend_with_backprop_it_is_the_gradient_of_the_step_before():
    _, reports, seen = stepped({"type": "blend", "weights": {"stale": 0.5, "backprop": 1.0}}, 2)
    g, h = gradient_at(seen[0]), gradient_at(seen[1])
    assert_near(seen[1], {name: w - A * g[name] for name, w in seen[0].items()})
    assert_near(seen[2], {name: w - A * (h[name] + 0.5 * g[name]) for name, w in seen[1].items()})
    assert reports[1].loss == reports[1].costs["backprop"].loss
    assert reports[0].costs["stale"].statistics == {}  # zero has no direction
    one, two = (torch.cat([x.flatten().double() for x in grads.values()]) for grads in (g, h))
    cosine = (one @ two / one.norm() / two.norm()).item()
    assert reports[1].costs["stale"].statistics["cosine"] == pytest.approx(cosine, rel=1e-4)


def test_the_loss_of_a_step_with_es_is_that_of_es():
    plan = schedule({"type": "phases", "phases": [
        {"steps": 1, "schedule": {"type": "single", "estimator": "backprop"}},
        {"schedule": {"type": "blend", "weights": {"stale": 1, "es": 1}}},
    ]})  # fmt: skip
    plan["estimators"]["es"] = ES
    hybrid = HybridOptimizer(tiny_model(), token_losses, schedule=plan)
    hybrid.step(token_batch())
    report = hybrid.step(token_batch())
    assert report.loss == report.costs["es"].loss > 0


def test_it_moves_and_remembers_only_what_it_shares_with_backprop():
    policy = [
        {"match": "mlp", "use": ["backprop", "stale"]},
        {"match": "attn", "use": ["backprop"]},
        {"match": ".*", "use": ["stale"]},
    ]
    hybrid, _, seen = stepped(TURNS, 2, policy=policy)
    for name in seen[0]:
        assert torch.equal(seen[1][name], seen[0][name]) == ("mlp" not in name and "attn" not in name), name
        assert torch.equal(seen[2][name], seen[1][name]) == ("mlp" not in name), name
    assert set(hybrid.estimators["stale"].latest) == {name for name in seen[0] if "mlp" in name}


def test_a_phase_without_backprop_goes_on_with_what_it_left_behind():
    phases = [
        {"steps": 1, "schedule": {"type": "single", "estimator": "backprop"}, "policy": [
            {"match": "mlp", "use": ["backprop"]}, {"match": ".*", "use": "frozen"}]},
        {"schedule": {"type": "single", "estimator": "stale"}},
    ]  # fmt: skip
    _, _, seen = stepped({"type": "phases", "phases": phases}, 3)
    g = gradient_at(seen[0])
    moved = {name: w - (A + 2 * B) * g[name] if "mlp" in name else w for name, w in seen[0].items()}
    assert_near(seen[3], moved)


def followed(*estimators) -> tuple[LocalEngine, Followers]:
    engine = LocalEngine(tiny_model())
    by_name = {str(number): e for number, e in enumerate(estimators)}
    return engine, Followers(engine, by_name, dict.fromkeys(by_name, frozenset(engine.parameters)))


def test_without_a_follower_no_gradient_is_read():
    engine, followers = followed(HybridOptimizer(tiny_model(), schedule="es_only").estimators["es"])
    followers.show(None, list(engine.parameters))  # None cannot be read
    assert followers.following == []
    hybrid, _, _ = stepped({"type": "single", "estimator": "backprop"}, 1)  # the file has one, which never acts
    assert (hybrid.estimators["stale"].latest, hybrid.followers.following) == ({}, [])


def test_a_gradient_that_is_not_finite_is_not_followed():
    stale = StaleGradientEstimator()
    engine, followers = followed(stale)
    ones = {name: torch.ones_like(p) for name, p in engine.parameters.items()}
    followers.show(Gradients(ones), list(ones))
    followers.show(Gradients({**ones, "lm_head.weight": ones["lm_head.weight"] / 0}), list(ones))
    assert all(bool((kept == 1).all()) for _, kept in stale.latest.values())
    followers.show(Gradients({name: 2 * one for name, one in ones.items()}), list(ones))
    assert all(bool((kept == 2).all()) for _, kept in stale.latest.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_saved_between_backprop_and_the_last_stale_step_goes_on_bitwise(tmp_path, dtype):
    stale = {**STALE, "learning_rate": 2e-2, "update": {"type": "momentum"}}

    def trainer(folder, **options):
        model, file = tiny_model().to(dtype), schedule(TURNS, stale=stale)
        return Trainer(model, token_losses, [token_batch(4), token_batch(5)], schedule=file, steps=5, probe=[token_batch(2)],
                       output=tmp_path / folder, display=Silence(), **options)  # fmt: skip

    def after_training(trainer):
        summary = trainer.train()
        return summary, weights(trainer.optimizer.engine.model)

    summary, whole = after_training(trainer("whole"))
    begun = trainer("broken")
    interrupt_after(begun, step=1)
    stopped, saved = after_training(begun)
    assert (stopped.finished, stopped.steps) == (False, 2)
    _, resumed = after_training(trainer("broken", resume=True))
    assert all(torch.equal(resumed[name], w) for name, w in whole.items())
    assert not all(torch.equal(saved[name], w) for name, w in whole.items())

    rows = [json.loads(line) for line in (tmp_path / "broken/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in rows] == [False, True, True, False, True]
    assert (rows[1]["losses"], rows[1]["forward_equivalents"]) == ({"stale": None}, 0.0)
    assert rows[2]["update_norms"]["stale"]["lm_head"] > 0
    assert (tmp_path / "broken/curves.png").stat().st_size > 1000
    share = summary.estimators["stale"]
    assert (share.steps, share.forwards, share.tokens) == (3, 0, 0)
    assert share.loss_decrease > 0


def test_plan_counts_no_tokens_for_it(write_run):
    """A backprop step processes 4 examples of 32 tokens, so the phase of 256 tokens ends with the second of them."""
    phases = [
        {"tokens": 256, "schedule": {"type": "alternate", "pattern": {"backprop": 1, "stale": 2}}},
        {"schedule": {"type": "single", "estimator": "backprop"}},
    ]
    run = load_run(write_run(schedule=schedule({"type": "phases", "phases": phases})))
    planned = [line.plain.split() for line in timeline(run, 6)]
    assert [line[-3] for line in planned[:-1]] == ["backprop", "stale", "backprop", "backprop"]
    assert planned[1][:4] == ["steps", "1", "to", "2"]
    assert planned[3][:4] == ["steps", "4", "to", "5"]


def test_a_part_of_a_kept_gradient_is_that_of_the_whole():
    model = tiny_model()
    engine = LocalEngine(model)
    estimator = StaleGradientEstimator()
    name = "lm_head.weight"
    gradient = torch.arange(engine.parameters[name].numel()).float()
    estimator.follow(engine, Gradients({name: gradient.view(engine.parameters[name].shape)}), [name])
    (shard,) = engine.shards([name])
    part = replace(shard, data=shard.data[100:130], start=100)
    kept = estimator.estimate(engine, None, None, [name], None)[0]
    assert torch.equal(kept.read(part), gradient[100:130])
    out = torch.ones(30)
    kept.add_to(out, part, 2.0)
    assert torch.equal(out, 1 + 2 * gradient[100:130])
