"""The latest gradient once more, against torch's own optimizers fed with it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hybrid_opt import HybridOptimizer, UserError, build, load_run, load_schedule
from hybrid_opt.checking import timeline
from hybrid_opt.training.progress import Silence
from tests.conftest import run_document, tiny_model, token_batch, token_losses

BACKPROP = {"type": "backprop", "optimizer": "SGD", "learning_rate": 0.5}
STALE = {"type": "stale_gradient", "learning_rate": 0.25}
PATTERN = {"type": "alternate", "pattern": {"backprop": 1, "stale": 2}}


def schedule(pattern=PATTERN, stale=STALE, **more):
    return {"estimators": {"backprop": BACKPROP, "stale": stale}, "schedule": pattern, **more}


def gradients(model):
    token_losses(model, token_batch()).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_its_steps_repeat_the_gradient_of_the_weights_before():
    model = tiny_model()
    start, g = {n: p.detach().clone() for n, p in model.named_parameters()}, gradients(tiny_model())
    optimizer = HybridOptimizer(model, token_losses, schedule=schedule())
    reports = [optimizer.step(token_batch()) for _ in range(3)]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), start[name] - (0.5 + 2 * 0.25) * g[name], rtol=1e-5, atol=1e-6)
    assert [report.loss is None for report in reports] == [False, True, True]
    cost = reports[1].costs["stale"]
    assert (cost.forwards, cost.backwards, cost.forward_equivalents, cost.tokens) == (0, 0, 0.0, 0)


def test_with_adam_it_is_torchs_adam_fed_with_the_same_gradient():
    model, other = tiny_model(), tiny_model()
    rule = {"type": "adam"}
    optimizer = HybridOptimizer(
        model, token_losses, schedule=schedule(stale={**STALE, "learning_rate": 0.01, "update": rule})
    )
    g = gradients(other)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.sub_(0.5 * g[name])
    adam = torch.optim.Adam(other.parameters(), lr=0.01)
    optimizer.step(token_batch())
    for _ in range(2):
        optimizer.step(token_batch())
        for name, p in other.named_parameters():
            p.grad = g[name].clone()
        adam.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


def test_before_the_first_gradient_nothing_moves():
    model = tiny_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = HybridOptimizer(
        model, token_losses, schedule=schedule({"type": "alternate", "pattern": {"stale": 2, "backprop": 1}})
    )
    optimizer.step(token_batch())
    optimizer.step(token_batch())
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_it_moves_only_what_the_policy_lets_it_and_backprop_has_a_gradient_for():
    policy = [
        {"layers": "0", "use": ["backprop", "stale"]},
        {"layers": "1", "use": ["stale"]},
        {"match": ".*", "use": ["backprop"]},
    ]
    model = tiny_model()
    optimizer = HybridOptimizer(model, token_losses, schedule=schedule(policy=policy))
    optimizer.step(token_batch())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(token_batch())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".layers.0." in name}


def test_a_blend_compares_it_with_the_fresh_gradient():
    """The second step's stale gradient is that of the first step."""
    model = tiny_model()
    optimizer = HybridOptimizer(
        model, token_losses, schedule=schedule({"type": "blend", "weights": {"backprop": 1, "stale": 1}})
    )
    old = gradients(tiny_model())
    optimizer.step(token_batch())
    copy = tiny_model()
    copy.load_state_dict(model.state_dict())
    new = gradients(copy)
    a, b = (torch.cat([g.flatten() for g in grads.values()]).double() for grads in (old, new))
    report = optimizer.step(token_batch())
    assert report.costs["stale"].statistics["cosine"] == pytest.approx((a @ b / a.norm() / b.norm()).item(), rel=1e-4)


def test_a_resumed_run_repeats_the_same_gradient(tmp_path, monkeypatch):
    def trained(name, **options):
        document = run_document(
            tmp_path / name,
            training={"steps": 6, "batch_size": 4, "probe_rows": 0},
            schedule=schedule(stale={**STALE, "learning_rate": 1e-3}) | {"policy": None},
        )
        document["schedule"]["estimators"]["backprop"] = {**BACKPROP, "learning_rate": 1e-3}
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(document))
        return build(load_run(path), display=Silence(), **options)

    trained("whole").train()
    halves = trained("halves")
    record = halves.display.stepped
    monkeypatch.setattr(halves.display, "stepped", lambda row, done: record(row, done) or signal_after(row, 1))
    halves.train()
    trained("halves", resume=True).train()
    whole, halved = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halved[name]) for name in whole)
    rows = [json.loads(line) for line in (tmp_path / "halves/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in rows] == [False, True, True] * 2


def signal_after(row, step):
    """Ask the process to stop, between the gradient and its second repetition."""
    import os
    import signal

    if row["step"] == step:
        os.kill(os.getpid(), signal.SIGTERM)


def test_it_needs_a_backprop_estimator_that_acts(tmp_path):
    with pytest.raises(
        UserError, match="stale repeats the latest gradient of backprop, but no backprop estimator acts"
    ):
        load_schedule(schedule({"type": "single", "estimator": "stale"}))


def test_the_plan_counts_no_tokens_of_it(tmp_path):
    phases = [{"tokens": 100, "schedule": PATTERN}, {"schedule": {"type": "single", "estimator": "backprop"}}]
    document = run_document(tmp_path / "out", schedule=schedule({"type": "phases", "phases": phases}))
    (tmp_path / "run.yaml").write_text(json.dumps(document))
    shown = [line.plain for line in timeline(load_run(tmp_path / "run.yaml"), 8)]
    # A backprop step counts 4 x 32 tokens: the first one ends the phase.
    assert shown[0].startswith("step  0")
    assert "phase 0" in shown[0]
    assert "phase 1" in shown[1]
