"""Long examples for one estimator and short ones for another."""

import math

import pytest
import torch

from hybrid_opt.config import load_run
from hybrid_opt.config.by_length import ByLength
from hybrid_opt.display.progress import Silence
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.build import build_estimator
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.batches import length_of
from hybrid_opt.objectives.language_model import left_padded
from hybrid_opt.training import length_threshold
from hybrid_opt.training.build import build
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from hybrid_opt.training.lengths import dealt
from hybrid_opt.training.measured_peak import largest_that_fits, peak_of_backprop
from tests.conftest import PROSE, interrupt_after, tiny_model
from tests.training.test_trainer import lines

ES = {"type": "es", "population_size": 4, "learning_rate": 0.05, "fitness_shaping": "none"}
SGD = {"type": "backprop", "learning_rate": 0.1, "optimizer": "SGD"}


def schedule(**changes) -> dict:
    by = {"type": "by_length", "long": "es", "short": "backprop", "length_threshold": 6, "alpha": 0.2, **changes}
    return {"estimators": {"es": ES, "backprop": SGD}, "schedule": by}


def padded(*lengths) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return left_padded([torch.randint(3, 64, (n,), generator=generator).tolist() for n in lengths], 0)


def losses(model, batch):
    """Next-token cross-entropy of each row, padding left out."""
    logits = model(**batch, use_cache=False).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    mask = batch["attention_mask"][:, :-1]
    return (each * mask).sum(1) / mask.sum(1)


def test_a_batch_is_split_and_its_padding_cut_off():
    batch = padded(3, 9, 6, 7, 4)
    parts = dealt(ByLength(**schedule()["schedule"]), batch)
    assert parts["backprop"]["input_ids"].tolist() == batch["input_ids"][[0, 2, 4], 3:].tolist()
    assert parts["es"]["input_ids"].tolist() == batch["input_ids"][[1, 3]].tolist()
    assert parts["backprop"]["position_ids"].shape == (3, 6)
    rows = {
        "input_ids": torch.ones(2, 2, 7),
        "attention_mask": torch.tensor([[[0] * 5 + [1] * 2] * 2, [[1] * 7, [0] * 7]]),
    }
    assert [part["input_ids"].shape for part in dealt(ByLength(**schedule()["schedule"]), rows).values()] == [
        (1, 2, 2),
        (1, 2, 7),
    ]


def test_a_step_is_both_estimates_with_their_weights():
    """Against autograd on the short rows and an estimator asked by itself on the long ones: `w - 0.1 (0.2 g_es + 0.8 g)`."""
    net, batch = tiny_model(), padded(3, 9, 6, 7)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    short = {key: value[[0, 2], 3:] for key, value in batch.items()}
    losses(net, short).mean().backward()
    expected = {name: 0.8 * p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    own = HybridOptimizer(net, losses, schedule=schedule(), seed=3)
    engine = LocalEngine(net)
    estimator = build_estimator(own.config.estimators["es"])
    long = {key: value[[1, 3]] for key, value in batch.items()}
    estimate, _ = estimator.estimate(engine, own.objective, long, list(start), StepKey(3, 0, "es"))
    for shard in engine.shards(start):
        expected[shard.name] += 0.2 * estimate.read(shard).view(shard.shape)
    report = own.step(batch)
    assert report.weights == {"es": 0.2, "backprop": 0.8}
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), start[name] - 0.1 * expected[name], rtol=1e-5, atol=1e-7)
    assert report.tokens == 4 * 16 + 9  # four members on the long rows, one pass over the short ones


def test_a_step_of_one_kind_alone_and_skip_long():
    own = HybridOptimizer(tiny_model(), losses, schedule=schedule())
    trace = [own.step(padded(*lengths)).weights for lengths in ((7, 9), (3, 4), (3, 9))]
    assert trace == [{"es": 0.2}, {"backprop": 0.8}, {"es": 0.2, "backprop": 0.8}]
    assert own.updates.turns.rested == {"es": 0, "backprop": 0}
    skipping = HybridOptimizer(tiny_model(), losses, schedule=schedule(skip_long=True))
    assert skipping.step(padded(3, 9)).weights == {"backprop": 0.8}
    with pytest.raises(
        UserError, match="skip_long leaves nothing of this batch: none of its 2 examples has at most 6 tokens"
    ):
        skipping.step(padded(8, 9))
    with pytest.raises(UserError, match="by_length splits a batch by its examples' tokens"):
        own.step(lambda: losses(own.engine.model, padded(3)))


def run_file(write_run, **by):
    slow = {"es": {**ES, "learning_rate": 1e-4}, "backprop": {**SGD, "learning_rate": 1e-3}}
    recipe = {**schedule(**by), "estimators": slow, "policy": [{"match": ".*", "use": ["es", "backprop"]}]}
    data = {"train": str(PROSE.parent.parent.parent / "examples/spam/spam_test.jsonl"), "validation": 0.05, "max_tokens": 64,
            "prompt": "{subject}\n{body}\nSpam or ham?", "completion": " {label}", "choices": [" spam", " ham"]}  # fmt: skip
    training = {
        "steps": 4,
        "batch_size": 4,
        "probe_rows": 0,
        **({"memory_budget": "20GB"} if by.get("length_threshold") == "auto" else {}),
    }
    return load_run(write_run(schedule=recipe, data=data, training=training))


def test_a_run_deals_its_examples_out(write_run):
    trainer = build(run_file(write_run, length_threshold=60, long_batch_size=2), display=Silence())
    sides = {name: batches.examples for name, batches in trainer.own_batches.items()}
    assert max(map(length_of, sides["backprop"])) == 60
    assert min(map(length_of, sides["es"])) == 61
    assert sum(map(len, sides.values())) == len(trainer.batches.examples)
    assert len(trainer.own_batches["es"].batch_at(0)["labels"]) == 2
    trainer.train()
    rows = lines(trainer.folder.metrics)
    assert [row["estimators"] for row in rows] == [["es", "backprop"]] * 4
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_a_resumed_run_is_the_same(write_run, tmp_path):
    whole = build(run_file(write_run, length_threshold=60), display=Silence())
    whole.train()
    run = run_file(write_run, length_threshold=60).model_copy(update={"output": str(tmp_path / "cut")})
    first = build(run, display=Silence())
    interrupt_after(first, step=1)
    first.train()
    rest = build(run, resume=True, display=Silence())
    rest.train()
    for a, b in zip(whole.optimizer.engine.model.parameters(), rest.optimizer.engine.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_auto_is_the_longest_that_fits(write_run, monkeypatch):
    """A step takes 400 MB for each token of the longest row: in 20 GB fit 50, 49 of the example and one of a choice. It is measured once."""
    tried = []

    def peak(engine, config, names, objective, batch):
        tried.append(batch["input_ids"].shape[-1])
        return 400e6 * tried[-1]

    monkeypatch.setattr(length_threshold, "peak_of_backprop", peak)
    monkeypatch.setattr("hybrid_opt.training.memory_budget.peak_of_backprop", lambda *args: 0)
    run = run_file(write_run, length_threshold="auto")
    trainer = build(run, display=Silence())
    assert trainer.optimizer.config.schedule.length_threshold == 49
    assert len(tried) < 12
    assert max(map(length_of, trainer.own_batches["backprop"].examples)) == 49
    interrupt_after(trainer, step=1)
    trainer.train()
    assert (
        "length_threshold: auto is 49 tokens, with which backprop takes 20 of 20 GB"
        in (trainer.folder.path / "messages.log").read_text()
    )
    tried.clear()
    assert build(run, resume=True, display=Silence()).optimizer.config.schedule.length_threshold == 49
    assert not tried

    monkeypatch.setattr(length_threshold, "peak_of_backprop", lambda *args: 0)
    everything = build(run, overwrite=True, display=Silence())
    assert everything.optimizer.config.schedule.skip_long
    assert "so es has nothing to do" in everything.notes[0]
    monkeypatch.setattr(length_threshold, "peak_of_backprop", lambda *args: 30e9)
    with pytest.raises(UserError, match="not even backprop on the shortest examples"):
        build(run, overwrite=True, display=Silence())


@pytest.mark.parametrize("limit", range(9))
def test_the_largest_that_fits(limit):
    tried = []
    assert largest_that_fits(8, lambda n: tried.append(n) or n <= limit) == limit
    assert all(n <= max(1, 2 * limit) for n in tried)


def test_a_real_peak_is_taken_back():
    net, batch = tiny_model(), padded(5, 9)
    own = HybridOptimizer(
        net,
        losses,
        schedule={
            "estimators": {"backprop": {"type": "backprop", "learning_rate": 1}},
            "schedule": {"type": "single", "estimator": "backprop"},
        },
    )
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    peak = peak_of_backprop(own.engine, own.config.backprop, list(before), own.objective, batch)
    assert 1e8 < peak < 1e11
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert not own.engine.optimizer.state


@pytest.mark.parametrize(
    ("by", "message"),
    [
        (
            {"length_threshold": 1000},
            "schedule.length_threshold: no training example has more than 1000, so 'es' would have nothing to do; they have",
        ),
        ({"length_threshold": 1}, "no training example has 1 tokens or less, so 'backprop' would have nothing to do"),
        ({"short": "es"}, "long and short are both 'es'"),
        ({"alpha": 1.5}, "less than 1"),
        ({"long": "ess"}, "the estimator 'ess', which is not defined"),
        (
            {"length_threshold": "auto", "short": "es", "long": "backprop"},
            "auto goes by what backprop takes, but short names 'es', which is es",
        ),
    ],
)
def test_what_cannot_be_is_said(write_run, by, message):
    with pytest.raises(UserError) as error:
        build(run_file(write_run, **by), display=Silence())
    assert message in str(error.value)
