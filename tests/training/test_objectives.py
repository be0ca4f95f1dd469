"""Different objectives for different estimators in one schedule, and the pull to the first weights."""

import json

import pytest
import torch
import yaml
from torch import nn

from hybrid_opt.config import load_run
from hybrid_opt.display.progress import Silence
from hybrid_opt.errors import UserError
from hybrid_opt.training.build import build
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from hybrid_opt.training.trainer import Trainer
from tests.conftest import die_before

BACKPROP = {"type": "backprop", "optimizer": "SGD", "learning_rate": 0.1}
ES = {
    "type": "es", "population_size": 6, "sigma": 0.1, "fitness_shaping": "none", "learning_rate": 0.05,
    "perturbation": {"type": "dense"},
}  # fmt: skip
BOTH = {"type": "blend", "weights": {"backprop": 1.0, "es": 1.0}}


class Point(nn.Module):
    def __init__(self, start=(1.0, -2.0, 0.5)):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start))


class Quadratic:
    """`1/2 |w - target_e|^2` for each example, and a record of what it was asked."""

    differentiable = True

    def __init__(self):
        self.seen = []

    def losses(self, model, batch):
        self.seen.append(batch["target"].clone())
        return 0.5 * (model.w - batch["target"]).square().sum(dim=1)

    def measures(self, model, batch):
        return {"loss": self.losses(model, batch)}


class Stepped(Quadratic):
    """The same in steps: no gradient."""

    differentiable = False

    def losses(self, model, batch):
        return super().losses(model, batch).mul(4).round()


def targets(*rows):
    return {"target": torch.tensor(rows)}


HERE, THERE = targets([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]), targets([2.0, 2.0, 2.0])


def optimizer(schedule, estimators=None, **options):
    document = {"estimators": estimators or {"backprop": BACKPROP, "es": ES}, "schedule": schedule}
    return HybridOptimizer(Point(), options.pop("objective", Stepped()), schedule=document, **options)


def test_each_estimator_minimises_its_own_on_its_own_batch():
    reward, loss = Stepped(), Quadratic()
    hybrid = optimizer(BOTH, objective=reward, objectives={"backprop": loss})
    report = hybrid.step(HERE, {"backprop": THERE})
    assert all(torch.equal(seen, THERE["target"]) for seen in loss.seen)
    assert len(loss.seen) == 1
    assert {len(seen) for seen in reward.seen} == {2, 4}  # a rehearsal takes the examples twice over
    assert all(set(map(tuple, seen.tolist())) == set(map(tuple, HERE["target"].tolist())) for seen in reward.seen)
    assert report.costs["backprop"].loss == pytest.approx(0.5 * (1 + 16 + 2.25))
    assert report.loss == report.costs["es"].loss  # of the run's own objective
    assert "cosine" not in report.costs["es"].statistics  # the two are no estimates of one gradient


def test_a_blend_is_the_sum_of_both_parts():
    both = optimizer(BOTH, objectives={"backprop": Quadratic()})
    both.step(HERE, {"backprop": THERE})
    gradient = (Point().w.detach() - 2.0).double()
    alone = optimizer({"type": "single", "estimator": "es"}, {"es": ES})
    alone.step(HERE)
    from_es = (Point().w.detach() - alone.engine.model.w.detach()).double() / 0.05
    expected = Point().w.detach().double() - 0.1 * (gradient + from_es)  # a blended step goes through the optimizer
    assert torch.allclose(both.engine.model.w.detach().double(), expected, atol=1e-5)


def test_a_step_without_the_runs_objective_has_no_loss():
    hybrid = optimizer({"type": "alternate", "pattern": {"backprop": 1, "es": 1}}, objectives={"backprop": Quadratic()})
    first, second = hybrid.step(HERE, {"backprop": THERE}), hybrid.step(HERE)
    assert first.loss is None
    assert first.costs["backprop"].loss > 0
    assert second.loss == second.costs["es"].loss


def test_backprop_needs_a_gradient_of_its_own():
    with pytest.raises(UserError, match=r"'backprop' is backprop, but the objective has no gradient; .* of its own"):
        optimizer(BOTH)
    with pytest.raises(UserError, match=r"objectives: 'backdrop' is none of .* \(did you mean 'backprop'\?\)"):
        optimizer(BOTH, objectives={"backdrop": Quadratic()})
    with pytest.raises(UserError, match="batches: 'adam' is none of"):
        optimizer(BOTH, objectives={"backprop": Quadratic()}).step(HERE, {"adam": HERE})


def test_a_flat_step_moves_nothing_not_even_by_momentum():
    class Flat(Stepped):
        flat = False

        def losses(self, model, batch):
            return super().losses(model, batch) * (not self.flat)

    objective = Flat()
    estimators = {"es": {**ES, "update": {"type": "momentum"}}, "backprop": BACKPROP}
    hybrid = optimizer({"type": "single", "estimator": "es"}, estimators, objective=objective)
    hybrid.step(HERE)
    before = hybrid.engine.model.w.detach().clone()
    objective.flat = True
    report = hybrid.step(HERE)
    assert report.costs["es"].is_empty
    assert torch.equal(hybrid.engine.model.w.detach(), before)
    objective.flat = False
    hybrid.step(HERE)
    assert not torch.equal(hybrid.engine.model.w.detach(), before)


# ---------------------------------------------------------------- anchor


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_an_anchored_es_step_adds_the_pull_to_its_estimate(rule):
    single, start = {"type": "single", "estimator": "es"}, Point().w.detach()
    anchored = optimizer(single, {"es": {**ES, "anchor": 0.3, "update": {"type": rule}}})
    anchored.step(HERE)  # no pull yet
    first = anchored.engine.model.w.detach().clone()
    anchored.step(HERE)
    second = anchored.engine.model.w.detach()

    def estimate(step, weights):
        """What a plain SGD step shows of the estimate of a step at these weights."""
        plain = optimizer(single, {"es": ES})
        for _ in range(step):
            plain.step(HERE)
        plain.engine.model.w.data.copy_(weights)
        plain.step(HERE)
        return (weights - plain.engine.model.w.detach()) / 0.05

    g0, g1 = estimate(0, start), estimate(1, first) + 0.3 * (first - start)
    if rule == "adam":
        m, v = 0.9 * 0.1 * g0 + 0.1 * g1, 0.999 * 0.001 * g0**2 + 0.001 * g1**2
        expected = (m / (1 - 0.9**2)) / ((v / (1 - 0.999**2)).sqrt() + 1e-8)
    else:
        expected = {"sgd": g1, "momentum": 0.9 * g0 + g1}[rule]
    assert torch.allclose((first - second) / 0.05, expected, atol=2e-4)


def test_an_anchored_gradient_is_that_of_the_penalised_loss():
    single, estimators = {"type": "single", "estimator": "backprop"}, {"backprop": {**BACKPROP, "anchor": 0.5}}
    hybrid = optimizer(single, estimators, objective=Quadratic())
    w, start = Point().w.detach().double(), Point().w.detach().double()
    for _ in range(5):
        hybrid.step(THERE)
        w = w - 0.1 * ((w - 2.0) + 0.5 * (w - start))
    assert torch.allclose(hybrid.engine.model.w.detach().double(), w, atol=1e-6)
    assert hybrid.updates.anchor.start["w"].tolist() == start.tolist()


def test_an_anchor_holds_the_first_weights_after_resuming_too(tmp_path):
    schedule = {
        "estimators": {"es": {**ES, "anchor": 0.5}, "backprop": {**BACKPROP, "anchor": 0.2}},
        "schedule": {"type": "alternate", "pattern": {"es": 1, "backprop": 2}},
    }

    def trainer(output, steps, **options):
        return Trainer(
            Point(),
            Quadratic(),
            [HERE, THERE],
            schedule=schedule,
            steps=steps,
            output=tmp_path / output,
            display=Silence(),
            **options,
        )

    whole = trainer("whole", 6)
    whole.train()
    part = trainer("part", 6, checkpoint_every=3)
    die_before(part, 4)
    resumed = trainer("part", 6, resume=True)
    resumed.train()
    assert torch.equal(resumed.optimizer.engine.model.w, whole.optimizer.engine.model.w)


# ---------------------------------------------------------------- run files

REWARD = {
    "objective": {
        "type": "reward",
        "rewards": [
            {"function": "exact_match"},
            {"function": "conciseness", "weight": 0.1, "arguments": {"column": "answer"}},
        ],
        "generation": {"max_new_tokens": 4, "stop": ["\n"]},
    },
    "data": {
        "train": {"task": "arithmetic", "rows": 20, "largest": 9, "operators": "+"},
        "validation": {"task": "arithmetic", "rows": 6, "largest": 9, "operators": "+"},
        "prompt": "Q: {question}\nA:",
        "completion": " {answer}\n",
        "max_tokens": 40,
    },
    "objectives": {"backprop": {"objective": {"type": "causal_lm"}, "batch_size": 6}},
    "training": {"steps": 4, "batch_size": 3, "probe_rows": 2},
    "schedule": {
        "estimators": {
            "es": {"type": "es", "population_size": 6, "sigma": 0.02, "learning_rate": 1e-3},
            "backprop": {"type": "backprop", "learning_rate": 1e-3},
        },
        "schedule": {"type": "alternate", "pattern": {"backprop": 1, "es": 1}},
    },
}


def test_a_run_file_with_a_reward_and_a_loss(write_run, tmp_path):
    path = write_run(**REWARD)
    summary = build(load_run(path), display=Silence()).train()
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["estimators"] for row in rows] == [["backprop"], ["es"]] * 2
    assert [row["loss"] is None for row in rows] == [True, False] * 2
    assert rows[1]["losses"]["es"] == rows[1]["loss"]
    statistics = rows[1]["parts"]["es"]["statistics"]
    assert {"completion_tokens", "finished", "reward_errors", "tied_pairs", "exact_match", "conciseness"} <= set(
        statistics
    )
    assert statistics["reward_errors"] == 0
    assert rows[1]["loss"] == pytest.approx(-statistics["exact_match"] - 0.1 * statistics["conciseness"], abs=1e-5)
    assert set(summary.after) == {"loss", "reward", "exact_match", "conciseness", "finished"}
    assert summary.after["reward"] == pytest.approx(summary.after["exact_match"] + 0.1 * summary.after["conciseness"])
    again = yaml.safe_load((tmp_path / "out/run.yaml").read_text())  # the resolved copy is a run file
    assert again["objectives"]["backprop"]["objective"] == {"type": "causal_lm"}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({**again, "output": str(tmp_path / "again")}))
    assert build(load_run(tmp_path / "again.yaml"), display=Silence()).train().after == summary.after


def test_an_objective_of_its_own_may_have_data_of_its_own(write_run, tmp_path):
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"Alice said {i}. " * 9}) + "\n" for i in range(9))
    )
    own = {
        "objective": {"type": "causal_lm"},
        "data": {"train": "text.jsonl", "text": "text", "max_tokens": 16},
        "batch_size": 2,
    }
    path = write_run(**{**REWARD, "objectives": {"backprop": own}})  # beside the run file
    trainer = build(load_run(path), display=Silence())
    seen = []
    losses = trainer.optimizer.objectives["backprop"].losses
    trainer.optimizer.objectives["backprop"].losses = lambda model, batch: seen.append(batch) or losses(model, batch)
    trainer.train()
    assert [tuple(batch["input_ids"].shape) for batch in seen] == [(2, 16)] * 2
    assert "Alice" in trainer.tokenizer.decode(seen[0]["input_ids"][0])


def test_a_run_with_rewards_resumes_to_the_same_weights(write_run, tmp_path):
    path = write_run(**{**REWARD, "training": {**REWARD["training"], "checkpoint_every": 2}})
    whole = build(load_run(path, [f"output={tmp_path / 'whole'}"]), display=Silence())
    whole.train()
    part = build(load_run(path), display=Silence())
    die_before(part, 3)
    resumed = build(load_run(path), resume=True, display=Silence())
    resumed.train()
    weights = resumed.optimizer.engine.model.state_dict()
    assert all(torch.equal(weights[name], p) for name, p in whole.optimizer.engine.model.state_dict().items())
