"""What fits into a memory budget: by hand with invented sizes, and measured in real steps."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.display.progress import Silence
from hybrid_opt.errors import UserError
from hybrid_opt.machine.memory import forget_peak, peak_memory_bytes, present_memory_bytes, release_memory
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from hybrid_opt.training.memory_budget import MemoryBudget, Saving, savings_of
from hybrid_opt.training.trainer import Trainer
from tests.conftest import imports_are_done, interrupt_after, tiny_model, token_batch, token_losses
from tests.training.test_trainer import lines

CPU = torch.device("cpu")
ES = {
    "type": "es",
    "population_size": 4,
    "learning_rate": 1e-3,
    "fitness_shaping": "none",
    "update": {"type": "momentum"},
}
ADAMW = {"type": "backprop", "learning_rate": 1e-3}
TURNS = {"type": "alternate", "pattern": {"backprop": 1, "es": 1}}
BOTH = {"estimators": {"es": ES, "backprop": ADAMW}, "schedule": TURNS}


@pytest.fixture
def invented(monkeypatch):
    """A block takes 100 bytes with the whole batch of 8, in proportion to the part of it that is taken at once, and checkpointing saves
    three quarters of that; ES takes 150. Returns what was tried."""
    tried = []

    def peak(self, blocks, saving, objective, batch):
        tried.append((blocks, saving.micro_batch_size, saving.gradient_checkpointing))
        return round(100 * blocks * (saving.micro_batch_size or 8) / 8 * (0.25 if saving.gradient_checkpointing else 1))

    monkeypatch.setattr(MemoryBudget, "_backprop_peak", peak)
    monkeypatch.setattr(MemoryBudget, "_others_peak", lambda self, *args: 150)
    monkeypatch.setattr(MemoryBudget, "_kept_between_steps", lambda self, blocks: 0)
    return tried


def optimizer(budget, net=None, **changes) -> HybridOptimizer:
    net = net or tiny_model(num_hidden_layers=4)
    return HybridOptimizer(net, token_losses, schedule={**BOTH, **changes}, memory_budget=budget)


def owned_from(found: HybridOptimizer) -> tuple[str, int]:
    names = found.may_move("backprop")
    return names[0], len(names)


def test_the_trace_by_hand(invented):
    """Six blocks: embedding, four layers, and what follows them. With the smallest part and checkpointing a block takes 3 bytes (100/8/4),
    so with 160 all six fit at 19; of the quicker ways 600, 300 and 150 bytes, the third fits."""
    found = optimizer(160)
    found.acting()
    found.fit_memory(token_batch(examples=8))
    assert invented == [
        (1, None, False), (2, None, False), (2, 1, True), (4, None, False), (4, 1, True), (6, None, False), (6, 1, True),
        (6, 4, False), (6, 2, False),
    ]  # fmt: skip
    assert found.memory.fit == (6, Saving(2, False), 150)
    assert found.memory.told == (
        "memory_budget: backprop owns 6 of 6 blocks, from model.embed_tokens.weight on, with micro_batch_size 2; measured: es 1.5e-07 GB, "
        "backprop 1.5e-07 GB"
    )
    assert found.estimators["backprop"].config.micro_batch_size == 2


def test_fewer_blocks_where_not_all_fit(invented, monkeypatch):
    monkeypatch.setattr(MemoryBudget, "_others_peak", lambda self, *args: 0)
    found = optimizer(10)
    found.acting()
    found.fit_memory(token_batch(examples=8))
    assert [blocks for blocks, size, _ in invented[:8] if size == 1] == [1, 2, 4, 3]  # 3, 6, 12 and 9 bytes
    assert found.memory.fit == (3, Saving(1, True), 9)
    assert owned_from(found) == ("model.layers.2.self_attn.q_proj.weight", 2 * 9 + 2)
    assert found.estimators["backprop"].config.gradient_checkpointing
    assert len(found.may_move("es")) == len(list(found.engine.model.parameters()))


def test_what_may_be_tried():
    config = Backprop(type="backprop", learning_rate=1)
    assert savings_of(config, 6, True) == [
        Saving(size, checkpoints) for checkpoints in (False, True) for size in (None, 3, 1)
    ]
    assert savings_of(config, None, True) == [Saving(None, False), Saving(None, True)]
    halves = config.model_copy(update={"accumulation": 2})
    assert savings_of(halves, 8, False) == [Saving(None, False), Saving(2, False), Saving(1, False)]
    assert Saving(2, False).applied_to(halves).accumulation == 1
    own = config.model_copy(update={"micro_batch_size": 2, "gradient_checkpointing": True})
    assert savings_of(own, 8, True) == [Saving(2, True), Saving(1, True)]


def test_out_of_memory_saves_more_and_then_gives_blocks_away(invented, monkeypatch):
    """The device has less than was measured: each step of backprop that fails is tried again with less, and ES gets the rest."""
    from hybrid_opt.estimators.backprop import BackpropEstimator

    found, estimate = optimizer(160), BackpropEstimator.estimate

    def short_of_memory(self, engine, objective, batch, names, key):
        if "model.layers.0.mlp.up_proj.weight" in names:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return estimate(self, engine, objective, batch, names, key)

    monkeypatch.setattr(BackpropEstimator, "estimate", short_of_memory)
    before = {name: p.detach().clone() for name, p in found.engine.model.named_parameters()}
    report = found.step(token_batch(examples=8))
    assert found.memory.fit[:2] == (4, Saving(2, False))  # the first of which layer 0 is not
    assert "out of memory; memory_budget: backprop owns 4 of 6 blocks, from model.layers.1" in report.memory
    moved = {n for n, p in found.engine.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == set(found.may_move("backprop"))
    assert "model.layers.0.mlp.up_proj.weight" not in moved

    monkeypatch.setattr(BackpropEstimator, "estimate", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    found.step(token_batch(examples=8))  # es
    with pytest.raises(UserError, match="step 2, estimator backprop: out of memory"):
        found.step(token_batch(examples=8))


def test_a_step_that_takes_more_twice_in_a_row_leads_to_less(invented):
    found = optimizer(160)
    found.fit_memory(token_batch(examples=8))
    found.memory.take_told()
    found.memory.observe(200, ["es"])
    found.memory.observe(200, ["backprop"])
    found.memory.observe(100, ["backprop"])
    found.memory.observe(200, ["backprop"])
    assert found.memory.fit[:2] == (6, Saving(2, False))
    found.memory.observe(200, ["backprop"])
    assert found.memory.fit[:2] == (5, Saving(2, False))
    assert found.memory.take_told().startswith("a step took 2e-07 GB of 1.6e-07; memory_budget: backprop owns 5 of 6")


def test_a_resumed_run_keeps_what_was_chosen(invented, tmp_path):
    def trainer(place, **more):
        return Trainer(
            tiny_model(num_hidden_layers=4), token_losses, [token_batch(examples=8)], schedule=BOTH, steps=6, output=tmp_path / place,
            memory_budget=160, display=Silence(), **more,
        )  # fmt: skip

    whole, first = trainer("whole"), trainer("cut")
    whole.train()
    interrupt_after(first, step=2)
    first.train()
    invented.clear()
    rest = trainer("cut", resume=True)
    rest.train()
    assert not invented
    assert rest.optimizer.memory.fit == whole.optimizer.memory.fit
    for a, b in zip(whole.optimizer.engine.model.parameters(), rest.optimizer.engine.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "memory_budget: backprop owns 6 of 6 blocks" in lines(tmp_path / "cut/metrics.jsonl")[0]["decision"]
    assert "memory_budget: backprop owns 6 of 6 blocks" in (tmp_path / "cut/messages.log").read_text()


@pytest.mark.parametrize(
    ("budget", "changes", "message"),
    [
        (100, {}, "memory_budget: 1e-07 GB, but es takes 1.5e-07 GB by itself"),
        (
            160,
            {"policy": [{"match": "norm", "use": ["backprop"]}, {"match": ".*", "use": ["es"]}]},
            "to it alone; write use: [es, backprop]",
        ),
        (
            160,
            {
                "policy": [
                    {"layers": {"top": 1, "by": "gradient_norm"}, "use": ["backprop"]},
                    {"match": ".*", "use": ["es"]},
                ]
            },
            "policy.0 gives it those that matter most",
        ),
    ],
)
def test_what_cannot_be_is_said(invented, budget, changes, message):
    with pytest.raises(UserError) as error:
        optimizer(budget, **changes).step(token_batch(examples=8))
    assert message in str(error.value)


def test_backprop_alone_may_be_too_much(invented, monkeypatch):
    monkeypatch.setattr(MemoryBudget, "_others_peak", lambda self, *args: 0)
    with pytest.raises(UserError, match=r"but with backprop on model.norm.weight and what follows it takes 3e-09 GB"):
        optimizer(2).step(token_batch(examples=8))


def test_what_is_kept_between_steps_by_hand():
    """Of ES its momentum, one float32 a weight, of AdamW two for each weight of the last blocks, and nothing of an estimate."""
    found = optimizer(1 << 40)
    weights = [p.numel() for p in found.engine.model.parameters()]
    last = found.engine.model.model.norm.weight.numel() + found.engine.model.lm_head.weight.numel()
    assert found.memory._kept_between_steps(0) == 4 * sum(weights)
    assert found.memory._kept_between_steps(1) == 4 * sum(weights) + 8 * last


def wide_model():
    return tiny_model(
        num_hidden_layers=6, hidden_size=256, intermediate_size=1024, num_attention_heads=4, vocab_size=512
    )


def real_steps(output: Path) -> dict:
    """A run of a model of 5 million weights, whose training takes 120 MB, with 80 MB beside what is there before."""
    imports_are_done()
    net, batch = wide_model(), token_batch(examples=8, tokens=64, vocabulary=512)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    first = HybridOptimizer(wide_model(), token_losses, schedule=BOTH, memory_budget=1 << 40)
    for _ in range(2):  # what libraries load and keep at their first use
        first.step(batch)
    del first
    release_memory(CPU)
    budget = present_memory_bytes(CPU) + 80_000_000
    run = Trainer(
        net, token_losses, [batch], schedule=BOTH, steps=8, output=output, memory_budget=budget, display=Silence()
    )
    run.optimizer.fit_memory(batch)
    unchanged = all(torch.equal(p, start[name]) for name, p in net.named_parameters())
    chosen, without_state = run.optimizer.memory.fit, not run.optimizer.engine.optimizer.state
    run.train()
    peaks = [row["peak_memory_bytes"] for row in lines(output / "metrics.jsonl")]
    kept = run.optimizer.memory.fit

    everything = HybridOptimizer(wide_model(), token_losses, schedule=BOTH)  # what it would take without
    for _ in range(2):
        everything.step(batch)
    forget_peak(CPU)
    everything.step(batch)
    return {
        "budget": budget,
        "trying changed nothing": unchanged and without_state,
        "chosen": chosen,
        "peaks": peaks,
        "kept": kept,
        "peak without a budget": peak_memory_bytes(CPU),
    }


def test_real_steps_stay_within_the_budget_and_trying_changes_nothing(tmp_path):
    """In a process of its own: what other tests have left behind, and give back meanwhile, would be measured with it."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as processes:
        seen = processes.submit(real_steps, tmp_path).result()
    blocks, _, peak = seen["chosen"]
    assert seen["trying changed nothing"]
    assert 1 <= blocks < 8
    assert peak <= seen["budget"]
    assert max(seen["peaks"]) <= 1.05 * seen["budget"]
    assert seen["kept"][0] == blocks
    assert seen["peak without a budget"] > seen["budget"]
