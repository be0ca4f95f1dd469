"""What runs on every rank for `test_zero.py`: `python -m tests.engines.zero_scenarios FOLDER` under a launcher's variables.

One idea: importing torch and deepspeed takes longer than most scenarios, so one launch runs all scenarios that want as many
ranks, and rank 0 writes what each returned as JSON. A test then says what the numbers must be.
"""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_opt import HybridOptimizer, UserError
from hybrid_opt.config.engines import LocalEngine, ZeroEngine
from hybrid_opt.config.rewards import Generation
from hybrid_opt.engines.inner_products import inner_products
from hybrid_opt.engines.zero import join_ranks
from hybrid_opt.errors import DivergedError
from hybrid_opt.estimators.probing import NoiseSum
from hybrid_opt.noise.keys import Key
from hybrid_opt.objectives.contract import FunctionObjective
from hybrid_opt.objectives.language_model import left_padded
from hybrid_opt.objectives.reward import RewardObjective
from hybrid_opt.recovery.checkpoint import load_checkpoint, save_checkpoint
from hybrid_opt.training.save_model import save_model
from tests.conftest import GLASS, imports_are_done, tiny_model, token_batch, token_losses

STAGES = (1, 2, 3)
CPU = {"device": "cpu"}
LOSS_SCALE = {"fp16": {"initial_scale_power": 8}}
"""Low enough for the first step's gradients."""
ES = {
    "type": "es", "population_size": 4, "sigma": 0.02, "fitness_shaping": "none", "learning_rate": 0.05,
    "members_per_forward": 2, "perturbation": {"type": "low_rank", "noise_rank": 2},
}  # fmt: skip
DENSE = {**ES, "perturbation": {"type": "dense"}}
BACKPROP = {"type": "backprop", "gradient_clipping": 0.5}
# AdamW's first steps have the gradient's sign alone, so where it is nearly 0 its rounding decides; not so with this eps.
ADAMW = {**BACKPROP, "learning_rate": 0.01, "optimizer_arguments": {"eps": 1e-3}}
SGD = {**BACKPROP, "learning_rate": 0.1, "optimizer": "SGD", "optimizer_arguments": {"momentum": 0.9}}
STALE = {"type": "stale_gradient", "learning_rate": 0.02, "update": {"type": "momentum"}}
ONLY_ES = {"type": "single", "estimator": "es"}
ONLY_BACKPROP = {"type": "single", "estimator": "backprop"}
ALTERNATE = {"type": "alternate", "pattern": {"es": 2, "backprop": 1}}
TURNS = {"type": "alternate", "pattern": {"es": 1, "backprop": 1}}
BLEND = {"type": "blend", "weights": {"es": 0.3, "backprop": 0.7}}
STALE_TURNS = {"type": "alternate", "pattern": {"backprop": 1, "stale": 2}}
GUIDED_ES = {"type": "guided", "learning_rate": 0.05, "sigma": 0.02, "pairs": 3}
GUIDED = {
    "sketched gradients": {"guides": {"type": "gradients", "count": 2}, "storage": {"type": "sketch", "rank": 2}},
    "moment": {"guides": {"type": "first_moment"}, "form": {"type": "mixed_covariance"}},
    "estimates": {"guides": {"type": "estimates"}},
}
GUIDED_TURNS = {"type": "alternate", "pattern": {"backprop": 2, "guided": 2}}
STALE_BLEND = {"type": "blend", "weights": {"stale": 0.3, "backprop": 0.7}}
ATTENTION, MLP = {"match": "attn", "use": ["backprop"]}, {"match": "mlp", "use": ["backprop"]}
REST_ES, REST_FROZEN = {"match": ".*", "use": ["es"]}, {"match": ".*", "use": "frozen"}

SCENARIOS: dict[str, tuple[tuple[int, ...], Callable]] = {}


def scenario(*world_sizes: int):
    """Registers a function for launches of these sizes."""

    def register(function):
        SCENARIOS[function.__name__] = (world_sizes, function)
        return function

    return register


# ------------------------------------------------------------ building blocks


def schedule_file(schedule: dict, *, es: dict = ES, backprop: dict = ADAMW, policy: list | None = None) -> dict:
    """A schedule file with those of the estimators that the schedule names."""
    estimators = {
        n: c for n, c in (("es", es), ("backprop", backprop), ("stale", STALE)) if f'"{n}"' in json.dumps(schedule)
    }
    return {"estimators": estimators, "schedule": schedule} | ({"policy": policy} if policy else {})


def zero(stage: int, folder: Path | None = None, file: dict | None = None, **settings) -> ZeroEngine:
    """An `engine` section, with a DeepSpeed file if one is given."""
    if file is not None:
        path = folder / f"deepspeed-{os.environ['RANK']}.json"
        path.write_text(json.dumps(file))
        settings["deepspeed_config"] = str(path)
    return ZeroEngine(type="zero", zero_stage=stage, **settings)


def batch_of(step: int, examples: int = 4) -> dict[str, Tensor]:
    return token_batch(examples=examples, tokens=7 + step)


def small_model(kind: str = "llama") -> nn.Module:
    """Of one layer: what can go wrong does so in one layer."""
    return tiny_model(kind, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": 1})


class Uneven(nn.Module):
    """Odd numbers of values, a parameter of one value that the outermost module reads itself, and frozen ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 3, bias=False)
        self.shift, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(1))
        self.shift.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shift(self.down(torch.tanh(self.up(x)))) * self.scale


def uneven_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean(1)


def uneven_batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(6, 5, generator=generator), "y": torch.randn(6, 3, generator=generator)}


class Run:
    """A HybridOptimizer that has taken some steps, and their losses."""

    def __init__(
        self, file, engine, *, model=small_model, losses=token_losses, batch=batch_of, own=None, steps=4, after=None
    ):
        gc.freeze()  # DeepSpeed collects garbage often, which takes half a second with all that was imported
        self.batch, self.own, self.losses = batch, own or {}, []
        objectives = {name: losses for name, (losses, _) in self.own.items()}
        self.optimizer = HybridOptimizer(
            model(), losses, schedule=file, objectives=objectives, steps=steps, seed=1, engine=engine
        )
        self.engine = self.optimizer.engine
        self.after = after or (lambda run: None)

    def take(self, steps: int) -> "Run":
        for _ in range(steps):
            step = self.optimizer.signals.step
            own = {name: batch(step) for name, (_, batch) in self.own.items()}
            self.losses.append(self.optimizer.step(self.batch(step), own).loss)
            self.after(self)
        return self

    def weights(self) -> dict[str, Tensor] | None:
        return self.engine.whole_weights()


def run(file: dict, engine, *, steps: int = 4, **options) -> Run:
    result = Run(file, engine, steps=steps, **options).take(steps)
    result.engine.leave()
    return result


@contextmanager
def alone():
    """Inside, this is the only process; LocalEngine would refuse the launcher's number of them."""
    before = os.environ["WORLD_SIZE"]
    os.environ["WORLD_SIZE"] = "1"
    try:
        yield
    finally:
        os.environ["WORLD_SIZE"] = before


def local(file: dict, **options) -> Run:
    """The same on this process alone."""
    settings = options.pop("settings", {})
    with alone():
        return run(file, LocalEngine(type="local", device="cpu", **settings), **options)


def difference(one: dict[str, Tensor] | None, other: dict[str, Tensor] | None) -> float:
    """Largest difference of two models' weights; 0 on the ranks that do not have them."""
    if one is None or other is None:
        return 0.0
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


def furthest(losses: list[float | None], others: list[float | None]) -> float:
    """Largest difference of two runs' losses; steps that evaluate nothing have none in both."""
    assert [a is None for a in losses] == [b is None for b in others]
    return max(abs(a - b) for a, b in zip(losses, others, strict=True) if a is not None)


def compared(result: Run, reference: Run) -> dict:
    """How far a run is from the reference."""
    return {
        "losses": furthest(result.losses, reference.losses),
        "weights": difference(result.weights(), reference.weights()),
    }


def at_all_stages(
    file: dict, stages=STAGES, folder: Path | None = None, settings: dict | None = None, **options
) -> dict:
    """Every stage against LocalEngine, and how far the reference has gone from where it began."""
    reference = local(file, **options)
    begun = options.get("model", small_model)().state_dict()
    result = {str(s): compared(run(file, zero(s, folder, **settings or {}), **options), reference) for s in stages}
    return result | {"moved": difference(begun, reference.weights())}


def owned_masters(engine) -> dict[str, Tensor]:
    """Whole masters of what backprop may own, as DeepSpeed's own public function gives them."""
    return {
        n: safe_get_full_fp32_param(engine.parameters[n]).cpu().clone() for n in engine.movable if n in engine.owned
    }


def copies_disagree(engine) -> float:
    """Largest difference between what forward passes use and its rounded master, on any rank."""
    masters, whole, worst = owned_masters(engine), engine.whole_weights(), 0.0
    if whole is not None:
        worst = max(
            [(whole[n].float() - m.to(whole[n].dtype).float()).abs().max().item() for n, m in masters.items()] or [0.0]
        )
    for shard in engine.shards(engine.masters):
        used = engine.stage.weights(engine.parameters[shard.name])[0]
        worst = max(worst, (used.float() - shard.data.to(used.dtype).float()).abs().max().item())
    return engine.ranks.gather(torch.tensor(worst)).max().item()


def optimizer_state(engine) -> list[Tensor]:
    """Copies of all tensors with which the optimizer remembers something, on this rank."""
    state = engine.deepspeed.optimizer.optimizer.state
    return [v.clone() for values in state.values() for v in values.values() if isinstance(v, Tensor) and v.dim()]


def same_on_all_ranks(engine, flag: bool) -> bool:
    return not engine.ranks.any(not flag)


def all_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


# ------------------------------------------------------------ 1: the same as one process


@scenario(1, 2)
def es_low_rank(folder):
    return at_all_stages(schedule_file(ONLY_ES))


@scenario(1, 2)
def es_dense(folder):
    return at_all_stages(schedule_file(ONLY_ES, es=DENSE))


@scenario(1, 2)
def es_in_a_lazy_subspace(folder):
    lazy = {"type": "lazy_subspace", "noise_rank": 2, "refresh": 2}
    return at_all_stages(schedule_file(ONLY_ES, es={**ES, "perturbation": lazy}))


@scenario(1, 2)
def es_under_a_mask(folder):
    mask = {"type": "sparse_mask", "keep": 0.2, "refresh": 2}
    return at_all_stages(schedule_file(ONLY_ES, es={**DENSE, "learning_rate": 0.2, "wrappers": [mask]}))


@scenario(1, 2)
def es_with_relative_sigma(folder):
    return at_all_stages(schedule_file(ONLY_ES, es={**ES, "sigma": 0.2, "wrappers": [{"type": "relative_sigma"}]}))


@scenario(1, 2)
def es_under_the_mask_of_a_gradient(folder):
    mask = {"type": "sparse_mask", "keep": 0.2, "by": "sensitivity", "refresh": 1}
    return at_all_stages(schedule_file(TURNS, es={**DENSE, "wrappers": [mask]}, backprop=SGD), steps=4)


def reward_batch(step: int) -> dict:
    prompts = [[5, 9, 14, 20, 33], [7, 7], [11, 40, 2, 8, 50, 3, 17], [60 - step]]
    return {**left_padded(prompts, 0), "prompts": ["?"] * 4, "columns": {}}


def variety(completion_ids, **columns) -> list[float]:
    return [len(set(ids)) - 0.3 * len(ids) for ids in completion_ids]


def reward(temperature: float) -> RewardObjective:
    generation = Generation(max_new_tokens=6, temperature=temperature)
    return RewardObjective([variety], AutoTokenizer.from_pretrained(GLASS), generation)


@scenario(1, 2)
def es_on_a_reward(folder):
    """Ranks write completions of different lengths, and make as many passes as the longest needs where they share weights."""
    return at_all_stages(schedule_file(ONLY_ES), losses=reward(3.0), batch=reward_batch)


@scenario(2)
def es_on_a_reward_and_backprop_on_a_loss(folder):
    own = {"backprop": (token_losses, batch_of)}
    file = schedule_file(TURNS, es={**ES, "anchor": 0.1}, backprop={**SGD, "anchor": 0.2})
    return at_all_stages(file, losses=reward(0.0), batch=reward_batch, own=own)


@scenario(1, 2)
def backprop_by_adamw(folder):
    return at_all_stages(schedule_file(ONLY_BACKPROP))


@scenario(1, 2)
def backprop_by_sgd(folder):
    return at_all_stages(schedule_file(ONLY_BACKPROP, backprop=SGD))


@scenario(1, 2)
def alternate_with_adamw(folder):
    return at_all_stages(schedule_file(ALTERNATE, es=DENSE), steps=6)


@scenario(1, 2)
def alternate_with_sgd(folder):
    return at_all_stages(schedule_file(ALTERNATE, backprop=SGD), steps=6)


@scenario(1, 2)
def blend_with_adamw(folder):
    return at_all_stages(schedule_file(BLEND))


@scenario(1, 2)
def blend_with_sgd(folder):
    return at_all_stages(schedule_file(BLEND, es=DENSE, backprop=SGD))


@scenario(2)
def stale_gradients(folder):
    """Where backprop moves the attention and the embedding, and the gradient comes again for all but the embedding."""
    policy = [
        {"match": "attn", "use": ["backprop", "stale"]},
        {"match": "embed", "use": ["backprop"]},
        {"match": ".*", "use": ["stale"]},
    ]
    turns = schedule_file(STALE_TURNS, backprop=SGD, policy=policy)
    return {
        "turns": at_all_stages(turns, steps=5),
        "turns, offloaded": at_all_stages(turns, steps=5, settings={"offload_optimizer": CPU}),
        "blend": at_all_stages(schedule_file(STALE_BLEND, backprop=SGD)),
    }


@scenario(2)
def directions_that_know_each_other(folder):
    """Estimators that take inner products over all ranks, or whose members are not pairs."""
    steps = {"sigma": 0.02, "learning_rate": 0.05}
    dense = {name: {"type": "dense", "distribution": name} for name in ("sphere", "orthogonal", "rademacher")}
    estimators = {
        "orthogonal": {"type": "spsa", "pairs": 3, "perturbation": dense["orthogonal"], **steps},
        "sphere": {"type": "spsa", "pairs": 2, "perturbation": dense["sphere"], **steps, "curvature_floor": 1.0},
        "align": {"type": "align", "pairs": 3, "perturbation": ES["perturbation"], **steps, "learning_rate": 50.0},
        "fzoo": {"type": "fzoo", "population_size": 4, "perturbation": dense["rademacher"], **steps, "reuse": True},
    }
    estimators["fzoo"]["learning_rate"] = 3e-3
    return {
        name: at_all_stages({"estimators": {name: config}, "schedule": {"type": "single", "estimator": name}}, steps=3)
        for name, config in estimators.items()
    }


@scenario(2)
def guided(folder):
    """Backprop's gradients or moments of the attention guide the forward passes that move everything."""
    policy = [{"match": "attn", "use": ["backprop", "guided"]}, {"match": ".*", "use": ["guided"]}]
    result = {}
    for name, options in GUIDED.items():
        file = {
            "estimators": {"backprop": SGD, "guided": GUIDED_ES | options},
            "policy": policy,
            "schedule": GUIDED_TURNS,
        }
        result[name] = at_all_stages(file, steps=5)
    return result


# ------------------------------------------------------------ 2 and 3: narrow weights


@scenario(1, 2)
def es_in_bfloat16(folder):
    return at_all_stages(schedule_file(ONLY_ES), model=lambda: small_model().to(torch.bfloat16))


@scenario(2)
def narrow_runs_stay_near_float32(folder):
    result = {}
    for name, schedule in (("alternate", TURNS), ("blend", BLEND)):
        file = schedule_file(schedule, backprop=SGD)
        reference = local(file, steps=2)
        for kind in ("bf16", "fp16"):
            for stage in STAGES:
                engine = zero(stage, folder, LOSS_SCALE if kind == "fp16" else {}, **{kind: True})
                result[f"{name} {kind} {stage}"] = compared(run(file, engine, steps=2), reference)
    return result


@scenario(1, 2)
def masters_and_forward_copies(folder):
    """Per dtype, stage and policy the largest disagreement after each step."""
    result = {}
    by_groups = [
        {"match": "attn", "use": ["es"]},
        {"match": "mlp", "use": ["backprop"]},
        {"match": ".*", "use": ["es", "backprop"]},
    ]
    cases = [("bf16", TURNS, None), ("bf16", BLEND, by_groups), ("fp16", BLEND, None), ("fp16", TURNS, by_groups)]
    for kind, schedule, policy in cases:
        for stage in STAGES:
            found = []
            run(
                schedule_file(schedule, policy=policy),
                zero(stage, folder, LOSS_SCALE if kind == "fp16" else {}, **{kind: True}),
                steps=2,
                after=lambda run, found=found: found.append(copies_disagree(run.engine)),
            )
            result[f"{kind} {stage} {schedule['type']} {'by groups' if policy else 'one policy'}"] = found
    return result


@scenario(2)
def overflowing_steps(folder):
    """A loss scale that float16 gradients cannot stand at first: what moved in which step, and the scale after it."""
    result = {}
    settings = {"fp16": {"initial_scale_power": 19, "hysteresis": 1, "loss_scale_window": 1000}}
    for name, schedule, stages in (("backprop", ONLY_BACKPROP, (2,)), ("blend", BLEND, STAGES)):
        for stage in stages:
            for offload in ({}, {"offload_optimizer": CPU}) if stage > 1 and name == "blend" else ({},):
                moved, scales, masters = [], [], []

                def after(run, moved=moved, scales=scales, masters=masters):
                    now = [shard.data.clone() for shard in run.engine.shards(run.engine.movable)]
                    moved.append(run.engine.ranks.any(not all_equal(now, masters)) if masters else None)
                    masters[:] = now
                    scales.append(run.engine.loss_scale)

                done = run(
                    schedule_file(schedule), zero(stage, folder, settings, fp16=True, **offload), steps=8, after=after
                )
                result[f"{name} {stage} {'offloaded' if offload else 'on the device'}"] = {
                    "moved": moved, "scales": scales, "losses": done.losses, "disagree": copies_disagree(done.engine),
                }  # fmt: skip
    return result


@scenario(2)
def gradients_that_overflow_are_not_stale(folder):
    """Turns of backprop and its stale gradient from such a scale: what moved in which step, and the scale after it."""
    result = {}
    settings = {"fp16": {"initial_scale_power": 19, "hysteresis": 1, "loss_scale_window": 1000}}
    schedule = {"type": "alternate", "pattern": {"backprop": 1, "stale": 1}}
    for stage in STAGES:
        scales, masters = [], []

        def after(run, scales=scales, masters=masters):
            scales.append(run.engine.loss_scale)
            masters.append([shard.data.clone() for shard in run.engine.shards(run.engine.movable)])

        done = run(schedule_file(schedule), zero(stage, folder, settings, fp16=True), steps=10, after=after)
        moved = [done.engine.ranks.any(not all_equal(a, b)) for a, b in pairwise(masters)]
        result[str(stage)] = {"moved": [None, *moved], "scales": scales, "finite": done.engine.is_finite()}
    return result


@scenario(2)
def updates_before_a_step_without_gradient(folder):
    """An ES step, then one by SGD with a learning rate that is lost in rounding."""
    idle = {"type": "backprop", "optimizer": "SGD", "learning_rate": 1e-15}
    result = {}
    for kind in ("float32", "bf16"):
        for stage in STAGES:
            seen = []

            def after(run, seen=seen):
                seen.append((owned_masters(run.engine), run.weights()))

            run(schedule_file(TURNS, backprop=idle), zero(stage, bf16=kind == "bf16"), steps=2, after=after)
            if seen[0][1] is not None:
                (master, forward), (master_after, forward_after) = seen
                result[f"{kind} {stage}"] = {
                    "moved": difference(small_model().state_dict(), forward),
                    "masters": difference(master, master_after),
                    "forward copies": difference(forward, forward_after),
                }
    return result


# ------------------------------------------------------------ 4: whole copies under ZeRO-3


@scenario(2)
def forward_passes_right_after_a_step(folder):
    """The loss by the spread model, and by a plain model with its whole weights, after every step."""
    result = {}
    for threshold in (0, None, 10**9):
        for name, policy in (
            ("one policy", None),
            ("by groups", [ATTENTION, {"match": "mlp", "use": ["es"]}, {"match": ".*", "use": ["es", "backprop"]}]),
        ):
            found = []

            def after(run, found=found):
                batch = token_batch()
                with torch.no_grad():
                    spread = token_losses(run.engine.model, batch)
                    whole = run.weights()
                    if whole is not None:
                        plain = small_model()
                        plain.load_state_dict(whole)
                        found.append((spread - token_losses(plain, batch)).abs().max().item())

            file = {} if threshold is None else {"zero_optimization": {"stage3_param_persistence_threshold": threshold}}
            run(schedule_file(TURNS, policy=policy), zero(3, folder, file), after=after)
            result[f"{threshold} {name}"] = found
    return result


# ------------------------------------------------------------ 5: offloading


@scenario(2)
def offloaded(folder):
    result = {}
    file = schedule_file(BLEND, backprop={**SGD, "gradient_clipping": 0.2})
    for stage in STAGES:
        plain = run(file, zero(stage), steps=3)
        result[f"{stage} optimizer"] = compared(run(file, zero(stage, offload_optimizer=CPU), steps=3), plain)
    result["3 parameters"] = compared(run(file, zero(3, offload_param=CPU), steps=3), plain)
    both = zero(3, offload_optimizer=CPU, offload_param=CPU)
    result["3 both"] = compared(run(file, both, steps=3), plain)
    return result


# ------------------------------------------------------------ 6: how a batch is cut


@scenario(1, 2)
def batches_cut_in_parts(folder):
    result = {}
    for name, settings, examples in (
        ("accumulation 2", {"accumulation": 2}, 4),
        ("micro-batches of 1", {"micro_batch_size": 1}, 4),
        ("3 examples", {}, 3),
        ("3 examples, accumulation 2", {"accumulation": 2}, 3),
        ("1 example", {}, 1),
    ):
        file = schedule_file(BLEND, backprop={**SGD, **settings})
        result[name] = at_all_stages(file, batch=lambda step, n=examples: batch_of(step, n), steps=3)
    return result


@scenario(2)
def offloaded_batches_cut_in_parts(folder):
    file = schedule_file(BLEND, backprop={**SGD, "accumulation": 2})
    return at_all_stages(file, settings={"offload_optimizer": CPU}, steps=3)


# ------------------------------------------------------------ 7: phases that own different parameters


def changing_owners(backprop=ADAMW) -> dict:
    """Backprop owns the attention for two steps, then the MLPs, then nothing (ES acts), then both."""
    phases = [
        {"steps": 2, "schedule": ONLY_BACKPROP, "policy": [ATTENTION, REST_FROZEN]},
        {"steps": 2, "schedule": ONLY_BACKPROP, "policy": [MLP, REST_FROZEN]},
        {"steps": 1, "schedule": ONLY_ES, "policy": [REST_ES]},
        {"schedule": BLEND, "policy": [{"match": "attn|mlp", "use": ["es", "backprop"]}, REST_ES]},
    ]
    return schedule_file({"type": "phases", "phases": phases}, backprop=backprop)


@scenario(1, 2)
def owners_change(folder):
    # Clipped hard, so that a norm over more than the phase's own parameters would show.
    file = changing_owners({**SGD, "gradient_clipping": 0.05})
    result = at_all_stages(file, steps=7)
    offloading = {"offload_optimizer": CPU}
    return {"plain": result, "offloaded": at_all_stages(file, steps=7, settings=offloading)}


@scenario(2)
def owners_change_under_adamw(folder):
    return at_all_stages(changing_owners(), steps=7)


@scenario(2)
def groups_at_rest(folder):
    """The attention's masters and moments over the steps in which only the MLPs are trained."""
    result = {}
    for stage in STAGES:
        for offload in ({}, {"offload_optimizer": CPU}):
            seen = []

            def after(run, seen=seen):
                attention = [p for name, p in run.engine.parameters.items() if "attn" in name]
                moments = [safe_get_full_optimizer_state(p, m) for p in attention for m in ("exp_avg", "exp_avg_sq")]
                weights = [safe_get_full_fp32_param(p).clone() for p in attention]
                seen.append(([moment.clone() for moment in moments], weights))

            engine = run(changing_owners(), zero(stage, **offload), steps=4, after=after).engine
            result[f"{stage} {'offloaded' if offload else 'on the device'}"] = {
                "trained": engine.ranks.any(not all_equal(seen[0][1], seen[1][1])),
                "weights rest": same_on_all_ranks(engine, all_equal(seen[1][1], seen[3][1])),
                "moments rest": same_on_all_ranks(engine, all_equal(seen[1][0], seen[3][0])),
                "moments": max(moment.abs().max().item() for moment in seen[1][0]),
            }
    return result


@scenario(2)
def memory_of_es_parameters(folder):
    """Values of optimizer state and of float32 masters on all ranks together, where backprop owns only the attention."""
    result = {}
    file = schedule_file(TURNS, policy=[ATTENTION, REST_ES])
    for stage in STAGES:
        for masters in ("fp32", "none", "stochastic_rounding"):
            done = run(file, zero(stage, bf16=True, master_weights=masters), steps=2)
            engine = done.engine
            sizes = {n: p.numel() for n, p in small_model().named_parameters()}
            counted = [sum(t.numel() for t in optimizer_state(engine)), sum(m.numel() for m in engine.masters.values())]
            state, kept = engine.ranks.gather(torch.tensor(counted)).sum(0).tolist()
            result[f"{stage} {masters}"] = {
                "state": state, "masters": kept,
                "owned": sum(n for name, n in sizes.items() if "attn" in name),
                "es only": sum(n for name, n in sizes.items() if "attn" not in name),
                "dtypes": sorted({str(shard.data.dtype) for shard in engine.shards(set(engine.movable) - engine.owned)}),
                "finite": all(map(torch.isfinite, torch.tensor(done.losses))),
            }  # fmt: skip
    return result


# ------------------------------------------------------------ 8: alternating


@scenario(2)
def moments_over_es_steps(folder):
    result = {}
    for stage in STAGES:
        seen = []
        file = schedule_file({"type": "alternate", "pattern": {"backprop": 1, "es": 2}})
        done = run(file, zero(stage), steps=4, after=lambda run, seen=seen: seen.append(optimizer_state(run.engine)))
        result[str(stage)] = {
            "over es steps": same_on_all_ranks(done.engine, all_equal(seen[0], seen[2])),
            "over a backprop step": same_on_all_ranks(done.engine, all_equal(seen[2], seen[3])),
            "values": sum(t.numel() for t in seen[0]),
        }
    return result


@scenario(2)
def coupled_turns(folder):
    """Warm-up, memories that decay or start anew, and updates that are kept to the length of backprop's; and how far that is from without.

    Momentum and Adam of ES, SGD and AdamW of backprop; the first moments that the optimizer has in the end are compared too.
    """
    result = {}
    pattern = {"type": "alternate", "pattern": {"backprop": 2, "es": 2}}
    momentum, adam = {"type": "momentum"}, {"type": "adam"}
    cases = {
        "decay": ({**DENSE, "update": momentum}, ADAMW, {"state_on_switch": "decay", "warmup_after_switch": 2}, {}),
        "reset": ({**ES, "update": adam, "learning_rate": 0.005}, SGD, {"state_on_switch": "reset"}, {}),
        "reset, put away": ({**ES, "update": momentum}, ADAMW, {"state_on_switch": "reset"}, {"offload_idle_after": 1}),
        "decay, offloaded": ({**ES, "update": momentum}, SGD, {"state_on_switch": "decay"}, {"offload_optimizer": CPU}),
    }
    for name, (es, backprop, coupling, settings) in cases.items():
        file = schedule_file(pattern, es={**es, **coupling, "trust": 0.5}, backprop={**backprop, **coupling})
        free = local(schedule_file(pattern, es=es, backprop=backprop), steps=6)
        reference = local(file, steps=6)
        moments = {n: reference.engine.first_moment(n) for n in reference.engine.parameters}
        result[name] = {"by coupling": difference(reference.weights(), free.weights())}
        for stage in STAGES:
            done = run(file, zero(stage, **settings), steps=6)
            own = {n: done.engine.first_moment(n) for n in done.engine.parameters}
            result[name][str(stage)] = {
                **compared(done, reference),
                "moments": difference(own, moments),
                "latest": abs(done.optimizer.updates.trust.latest / reference.optimizer.updates.trust.latest - 1),
                "stale": bool(stage < 3 and not settings and stale_links(done.engine)),
            }
    return result


# ------------------------------------------------------------ 9: what crosses ranks


class Traffic:
    """Counts the bytes that this rank hands to torch.distributed, and those of them that go through Ranks.gather."""

    CALLS = {
        "all_gather": 1, "all_gather_into_tensor": 1, "_all_gather_base": 1, "all_gather_object": 1, "all_reduce": 0, "broadcast": 0,
        "broadcast_object_list": 0, "reduce": 0, "reduce_scatter": 1, "reduce_scatter_tensor": 1, "_reduce_scatter_base": 1,
        "all_to_all": 1, "all_to_all_single": 1, "send": 0, "gather": 0, "scatter": 1,
    }  # fmt: skip
    """Number of the argument that holds what is sent."""

    def __init__(self):
        self.sent, self.through_ranks, self._depth = 0, 0, 0

    def __enter__(self):
        from deepspeed.comm.torch import TorchBackend

        from hybrid_opt.engines.ranks import Ranks

        self._undo = []
        for name, position in self.CALLS.items():
            if hasattr(dist, name):
                self._wrap(dist, name, position)
        # DeepSpeed looked these two up when it was imported.
        for name in ("all_gather_function", "reduce_scatter_function"):
            for backend in {TorchBackend, type(_deepspeed_backend())}:
                if name in vars(backend):
                    self._wrap(backend, name, 2)
        for name in ("all_gather_function", "reduce_scatter_function"):
            if name in vars(_deepspeed_backend()):
                self._wrap(_deepspeed_backend(), name, 1)
        gather = Ranks.gather

        def counted(ranks, values):
            self.through_ranks += values.numel() * values.element_size() if ranks.world_size > 1 else 0
            return gather(ranks, values)

        Ranks.gather = counted
        self._undo.append(lambda: setattr(Ranks, "gather", gather))
        return self

    def __exit__(self, *error):
        for undo in self._undo:
            undo()

    def _wrap(self, place, name, position):
        original = getattr(place, name)

        def counted(*args, **kwargs):
            given = args[position] if position < len(args) else next(iter(kwargs.values()))
            if not self._depth:
                self.sent += _bytes(given)
            self._depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1

        setattr(place, name, counted)
        self._undo.append(lambda: setattr(place, name, original))


def _deepspeed_backend():
    import deepspeed.comm.comm as comm

    return comm.cdb


def _bytes(thing) -> int:
    if isinstance(thing, Tensor):
        return thing.numel() * thing.element_size()
    return sum(map(_bytes, thing)) if isinstance(thing, (list, tuple)) else len(json.dumps(thing, default=str))


@scenario(2)
def traffic_of_es_steps(folder):
    result = {}
    by_groups = [{"match": "mlp", "use": ["backprop"]}, REST_ES]
    for name, file, es_step in (
        ("es", schedule_file(ONLY_ES), 1),
        ("dense es", schedule_file(ONLY_ES, es=DENSE), 1),
        (
            "es beside backprop",
            schedule_file({"type": "alternate", "pattern": {"backprop": 1, "es": 2}}, policy=by_groups),
            2,
        ),
        ("backprop", schedule_file(ONLY_BACKPROP), 1),
    ):
        for stage in STAGES:
            done = Run(file, zero(stage)).take(es_step)  # the first step of a kind may look around
            with Traffic() as traffic:
                done.take(1)
            done.engine.leave()
            result[f"{name} {stage}"] = {"sent": traffic.sent, "through ranks": traffic.through_ranks}
    return result | {"values": sum(p.numel() for p in small_model().parameters())}


# ------------------------------------------------------------ 10: populations over ranks


def coefficients(engine_config, **es) -> list[float]:
    """The estimate at the initial weights: a coefficient for each noise direction."""
    optimizer = HybridOptimizer(
        small_model(),
        token_losses,
        schedule=schedule_file(ONLY_ES, es={**ES, **es}),
        engine=engine_config,
    )
    names = list(optimizer.engine.parameters)
    estimate, _ = optimizer.estimators["es"].estimate(
        optimizer.engine, FunctionObjective(token_losses), token_batch(examples=8), names, Key((3, 0))
    )
    optimizer.engine.leave()
    return estimate.coefficients.tolist()


@scenario(1, 2, 4)
def estimates(folder):
    return {
        f"{name} {stage}": coefficients(zero(stage), **es)
        for stage in (2, 3)
        for name, es in (
            ("population 8", {"population_size": 8}),
            ("population 6", {"population_size": 6}),
            ("distinct examples", {"population_size": 8, "distinct_examples": True}),
            ("dense", {"population_size": 8, "perturbation": {"type": "dense"}}),
            ("not antithetic", {"antithetic": False, "members_per_forward": 1, "population_size": 5}),
        )
    }


# ------------------------------------------------------------ 11: going on from a checkpoint


def interrupted(file: dict, engine: Callable, folder: Path, *, at: int, steps: int, **options) -> dict:
    """A run without interruption against one that is saved and loaded into another model."""
    whole = run(file, engine(), steps=steps, **options)
    first = Run(file, engine(), steps=steps, **options).take(at)
    ranks = first.engine.ranks
    saved = save_checkpoint(folder, at, ranks, lambda place: first.optimizer.state_dict(place / "engine"))
    first.engine.leave()
    make = options.pop("model", small_model)

    def spoiled() -> nn.Module:
        model = make()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.mul_(1.5)
        return model

    second = Run(file, engine(), steps=steps, model=spoiled, **options)
    second.optimizer.load_state_dict(load_checkpoint(saved, ranks.rank), saved / "engine")
    second.take(steps - at)
    second.engine.leave()
    return {
        "losses": furthest(second.losses, whole.losses[at:]),
        "weights": difference(second.weights(), whole.weights()),
    }


@scenario(2)
def resumed(folder):
    result = {}
    momentum = {**ES, "update": {"type": "momentum"}}
    adam = {**ES, "update": {"type": "adam"}, "learning_rate": 0.005}
    coupled = {**adam, "trust": 0.1, "warmup_after_switch": 2, "state_on_switch": "decay"}
    sensitive = {"type": "sparse_mask", "keep": 0.2, "by": "sensitivity", "refresh": 2}
    attention_es = [
        {"match": "attn", "use": ["es"]},
        {"match": "norm", "use": "frozen"},
        {"match": ".*", "use": ["backprop"]},
    ]
    rounded = {"bf16": True, "master_weights": "stochastic_rounding"}
    cases = {
        "es with momentum": (schedule_file(ONLY_ES, es=momentum), {}),
        "adam es beside backprop, norms frozen": (schedule_file(BLEND, es=adam, policy=attention_es), {}),
        "bf16 alternate with momentum": (schedule_file(ALTERNATE, es=momentum), {"bf16": True}),
        "stale gradients": (schedule_file(STALE_TURNS), {}),
        "masks of gradients": (schedule_file(TURNS, es={**DENSE, "wrappers": [sensitive]}), {}),
        "bf16 by groups": (schedule_file(BLEND, es=momentum, policy=attention_es), {"bf16": True}),
        "coupled": (schedule_file(TURNS, es=coupled, backprop={**ADAMW, "state_on_switch": "reset"}), {"bf16": True}),
        "bf16 by groups, rounded at random": (schedule_file(BLEND, es=momentum, policy=attention_es), rounded),
    }
    for name, (file, settings) in cases.items():
        for stage in STAGES if settings != rounded else (2, 3):
            place = folder / f"{name}-{stage}"
            engine = lambda stage=stage, settings=settings: zero(stage, **settings)  # noqa: E731
            result[f"{name} {stage}"] = interrupted(file, engine, place, at=2, steps=4)
    return result


def fails_at_nine_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """In the third step."""
    return token_losses(model, batch) * (float("nan") if batch["input_ids"].shape[1] == 9 else 1.0)


def rolled_back(engine, place: Path, at: int) -> Run:
    """Two steps, a third without a loss, back to what was there after step `at`, and two steps more."""
    taken = Run(schedule_file(BLEND, backprop=SGD), engine, losses=fails_at_nine_tokens).take(at)
    ranks, optimizer = taken.engine.ranks, taken.optimizer
    saved = save_checkpoint(place, at, ranks, lambda folder: optimizer.state_dict(folder / "engine"))
    try:
        taken.take(3 - at)
    except DivergedError:
        optimizer.roll_back(load_checkpoint(saved, ranks.rank), saved / "engine")
        optimizer.skip_step()
    taken.take(2)
    assert optimizer.signals.step == 5
    taken.engine.leave()
    return taken


def said_of(value: float, stage: int, *, after_update: bool) -> str:
    """What all ranks say where rank 1 writes a value into its part of the last layer, in the update of a step or before it."""
    taken = Run(schedule_file(ONLY_ES), zero(stage))
    engine, apply = taken.engine, taken.engine.apply
    taken.optimizer.checks.drift_every = 1
    taken.take(1)

    def write(*arguments):
        if after_update:
            apply(*arguments)
        if engine.ranks.rank == 1:
            engine.stage.weights(engine.parameters["lm_head.weight"])[0][3] = value

    try:
        if after_update:
            engine.apply = write
        else:
            write()
        taken.take(1)
        said = ""
    except UserError as error:
        said = f"{type(error).__name__}: {error}"
    taken.engine.leave()
    return said if same_on_all_ranks(engine, "lm_head.weight" in said) else ""


@scenario(2)
def diverging(folder):
    result = {}
    for at in (0, 1):
        with alone():
            here = folder / f"local-{at}-{os.environ['RANK']}"
            reference = rolled_back(LocalEngine(type="local", device="cpu"), here, at)
        for stage in STAGES:
            found = compared(rolled_back(zero(stage), folder / f"{stage}-{at}", at), reference)
            result[f"back to step {at} {stage}"] = max(found.values())
    for stage in STAGES:
        result[f"lost {stage}"] = said_of(float("inf"), stage, after_update=True)
        result[f"drifted {stage}"] = said_of(0.5, stage, after_update=False)
    return result


@scenario(2)
def taken_again_from_records(folder):
    """ES steps between backprop steps, from the weights and the state before them; the last one evaluated by itself."""
    result = {}
    adam = {**ES, "update": {"type": "adam"}, "learning_rate": 0.005}
    turns = {"type": "alternate", "pattern": {"backprop": 1, "es": 4}}
    cases = {"es": (schedule_file(ONLY_ES, es=adam), 0), "after backprop": (schedule_file(turns, es=adam), 1)}
    for name, (file, at) in cases.items():
        for stage in STAGES:
            place = folder / f"{name}-{stage}"
            first = Run(file, zero(stage), steps=4).take(at)
            ranks = first.engine.ranks
            saved = save_checkpoint(place, at, ranks, lambda p, run=first: run.optimizer.state_dict(p / "engine"))
            records = [first.optimizer.step(first.batch(step)).record for step in range(at, 4)]
            documents = [json.loads(json.dumps(record.document(first.engine))) for record in records]
            first.engine.leave()
            second = Run(file, zero(stage), steps=4)
            second.optimizer.load_state_dict(load_checkpoint(saved, ranks.rank), saved / "engine")
            for document in documents[:-1]:
                second.optimizer.replay(document)
            second.take(1)
            second.engine.leave()
            result[f"{name} {stage}"] = difference(second.weights(), first.weights())
    return result


@scenario(2)
def resumed_with_groups_that_never_acted(folder):
    """Saved after the first phase: the MLPs' group has no moments yet."""
    result = {}
    for offload in ({}, {"offload_optimizer": CPU}):
        for stage in STAGES:
            name = f"{stage} {'offloaded' if offload else 'on the device'}"
            engine = lambda stage=stage, offload=offload: zero(stage, **offload)  # noqa: E731
            result[name] = interrupted(changing_owners(), engine, folder / name, at=2, steps=6)
    return result


@scenario(2)
def resumed_before_backprop_acted(folder):
    """Saved after ES steps alone, in a schedule whose optimizer has not stepped yet."""
    return {
        str(stage): interrupted(schedule_file(ALTERNATE), lambda s=stage: zero(s), folder / str(stage), at=1, steps=4)
        for stage in STAGES
    }


@scenario(1, 2, 4)
def resumed_with_frozen_and_uneven_parameters(folder):
    uneven = {"model": Uneven, "losses": uneven_losses, "batch": uneven_batch}
    es = {**DENSE, "update": {"type": "momentum"}}
    policy = [{"match": "up", "use": ["es"]}, {"match": ".*", "use": ["es", "backprop"]}]
    file = schedule_file(TURNS, es=es, policy=policy)
    return {
        str(stage): interrupted(file, lambda s=stage: zero(s), folder / str(stage), at=2, steps=4, **uneven)
        for stage in STAGES
    }


# ------------------------------------------------------------ 12: the model on disk


def differs_from_saved(engine, path: Path, model_of: Callable) -> float:
    """How far the logits of the trained model are from those of the saved one."""
    batch = token_batch()
    engine.model.eval()
    with torch.no_grad():
        trained = engine.model(**batch, use_cache=False).logits
        if engine.ranks.rank:
            return 0.0
        return (trained - model_of(path)(**batch, use_cache=False).logits).abs().max().item()


def loaded(path: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path).eval()


@scenario(2)
def saved_with_tied_embeddings(folder):
    result = {}
    for stage in STAGES:
        tied = {"model": lambda: small_model("gpt2")}
        engine = run(schedule_file(TURNS, policy=None), zero(stage), **tied).engine
        weights = engine.whole_weights()
        save_model(engine, None, folder / str(stage))
        result[str(stage)] = {
            "logits": differs_from_saved(engine, folder / str(stage) / "model", loaded),
            "tied": weights is None or torch.equal(weights["transformer.wte.weight"], weights["lm_head.weight"]),
            "moved": difference(small_model("gpt2").state_dict(), weights),
        }
    return result


@scenario(2)
def saved_with_adapters(folder):
    import peft

    def adapted() -> nn.Module:
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        torch.manual_seed(5)
        return peft.get_peft_model(small_model(), settings)

    def with_adapter(path: Path) -> nn.Module:
        return peft.PeftModel.from_pretrained(small_model(), path).eval()

    result = {}
    for stage in STAGES:
        engine = run(schedule_file(TURNS), zero(stage), model=adapted).engine
        place = folder / str(stage)
        save_model(engine, None, place)
        result[str(stage)] = {
            "adapter": differs_from_saved(engine, place / "adapter", with_adapter),
            "merged": differs_from_saved(engine, place / "model", loaded),
            "moved": difference(adapted().state_dict(), engine.whole_weights()),
        }
    return result


@scenario(2)
def adapters_like_local(folder):
    import peft

    def adapted() -> nn.Module:
        torch.manual_seed(5)
        return peft.get_peft_model(
            small_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )

    return at_all_stages(schedule_file(BLEND, backprop=SGD), model=adapted)


# ------------------------------------------------------------ 13: ranks that differ


@scenario(2)
def ranks_that_differ(folder):
    """What each rank is told when one weight of rank 1 is another, at every place that is looked at."""
    result = {}
    for stage, name in ((1, "model.layers.0.mlp.up_proj.weight"), (2, "model.norm.weight"), (3, "model.norm.weight")):
        done = run(schedule_file(ONLY_ES), zero(stage), steps=1)
        done.engine.compare_ranks(0)
        if done.engine.ranks.rank == 1:
            with torch.no_grad():
                done.engine.parameters[name].data.view(-1)[3] += 1e-6
        try:
            done.engine.compare_ranks(7)
            said = ""
        except UserError as error:
            said = str(error)
        told = done.engine.ranks.any(not (name in said and "rank 1" in said and "step 7" in said))
        result[str(stage)] = {"all ranks were told": not told, "said": said}
    return result


@scenario(2)
def ranks_that_differ_while_training(folder):
    done = Run(schedule_file(ONLY_ES), zero(2, check_every=2)).take(2)
    if done.engine.ranks.rank == 1:
        with torch.no_grad():
            done.engine.parameters["lm_head.weight"].data[0, 0] += 1e-3
    said = []
    for _ in range(2):
        try:
            done.take(1)
            said.append("")
        except UserError as error:
            said.append(str(error))
    return said


# ------------------------------------------------------------ 14: idle optimizer state


@scenario(2)
def optimizer_state_put_away(folder):
    result = {}
    file = schedule_file({"type": "alternate", "pattern": {"backprop": 1, "es": 2}})
    for stage in STAGES:
        plain, away = run(file, zero(stage, bf16=True), steps=5), []
        idle = run(
            file,
            zero(stage, bf16=True, offload_idle_after=2),
            steps=5,
            after=lambda run, away=away: away.append(run.engine.idle.is_away),
        )
        saved = interrupted(file, lambda s=stage: zero(s, offload_idle_after=2), folder / str(stage), at=3, steps=5)
        result[str(stage)] = compared(idle, plain) | {"away": away, "saved while away": saved}
    return result


@scenario(2)
def offloaded_state_put_away(folder):
    """State that is in main memory for good, as the section or the DeepSpeed file says, stays there."""
    result = {}
    file = schedule_file({"type": "alternate", "pattern": {"backprop": 1, "es": 2}})
    for stage, sections in (
        (2, ["offload_optimizer"]),
        (3, ["offload_optimizer", "offload_param"]),
        (3, ["offload_param"]),
    ):
        plain = run(file, zero(stage))
        offload = dict.fromkeys(sections, CPU)
        for place in ("section", "file"):
            settings = offload if place == "section" else {"file": {"zero_optimization": offload}, "folder": folder}
            idle = run(file, zero(stage, offload_idle_after=2, **settings))
            result[f"{stage} {'+'.join(sections)} {place}"] = compared(idle, plain)
    return result


# ------------------------------------------------------------ 15: what backprop leaves behind, whole on every rank


class Recorder:
    """Follows backprop: the latest gradient, whole, and how far this rank's shards of it are from that."""

    def follow(self, engine, gradient, names):
        self.whole, self.differs = {}, 0.0
        for name in sorted(names):
            whole = gradient.whole(name)
            self.whole[name] = whole.clone()
            for shard in engine.shards([name]):
                part = whole[shard.start : shard.start + len(shard.data)]
                self.differs = max(self.differs, (part - gradient.read(shard)).abs().max().item())


def left_behind(file: dict, engine) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, float]:
    """After three steps, the second by backprop: the last gradient, the first moments, and a direction's norms by parameter."""
    run, recorder = Run(file, engine), Recorder()
    optimizer = run.optimizer
    optimizer.followers.following.append((recorder, set(optimizer.policies[None].names("backprop"))))
    engine = run.take(3).engine
    moments = {name: engine.first_moment(name) for name in engine.parameters}
    perturbation = optimizer.estimators["es"].perturbation
    direction = NoiseSum(perturbation, [Key((0,))], torch.ones(1, dtype=torch.float64))
    norms = torch.stack([inner_products(engine, [name], [direction]) for name in engine.parameters]).flatten()
    stale = getattr(engine, "idle", None) and not engine.idle.stays and stale_links(engine)
    return (
        recorder.whole,
        {n: m.clone() for n, m in moments.items() if m is not None},
        norms,
        recorder.differs + bool(stale),
    )


def stale_links(engine) -> bool:
    """Whether a parameter's view of its optimizer state is of other memory than the state (stages 1 and 2)."""
    links = [(p, getattr(p, "_hp_mapping", None)) for n, p in engine.parameters.items() if n in engine.owned]
    return any(
        view.untyped_storage().data_ptr() != engine.stage.optimizer_state(p)[key].untyped_storage().data_ptr()
        for p, mapping in links
        for key, view in (mapping.optim_fragment if mapping else {}).items()
    )


@scenario(2)
def gradients_and_moments_are_whole(folder):
    file = schedule_file(
        TURNS, es=DENSE, policy=[ATTENTION, REST_ES]
    )  # ES first, so that state goes away before there is any
    with alone():
        gradient, moments, norms, _ = left_behind(file, LocalEngine(type="local", device="cpu"))
    result = {"gradients": len(gradient), "moments": len(moments)}
    for stage in STAGES:
        for idle in (None, 1):
            found = left_behind(file, zero(stage, offload_idle_after=idle))
            result[f"{stage} {idle}"] = {
                "gradient": difference(found[0], gradient),
                "moments": difference(found[1], moments),
                "norms": ((found[2] - norms) / norms).abs().max().item(),
                "shards": found[3],
            }
    return result


# ------------------------------------------------------------ 16: sizes that do not go up evenly


@scenario(1, 2, 4)
def uneven_sizes(folder):
    result = {}
    options = {"model": Uneven, "losses": uneven_losses, "batch": uneven_batch}
    by_groups = [
        {"match": "up", "use": ["es"]},
        {"match": "down", "use": ["backprop"]},
        {"match": ".*", "use": ["es", "backprop"]},
    ]
    for name, schedule in (("es", ONLY_ES), ("backprop", ONLY_BACKPROP), ("turns", TURNS), ("blend", BLEND)):
        result[name] = at_all_stages(schedule_file(schedule, es=DENSE, backprop=SGD), **options)
    result["by groups"] = at_all_stages(schedule_file(BLEND, es=DENSE, backprop=SGD, policy=by_groups), **options)
    return result


@scenario(1, 2, 4)
def frozen_parameters(folder):
    """What the frozen layer is after training, minus what it was."""
    begun = Uneven().state_dict()
    result = {}
    for stage in STAGES:
        done = run(schedule_file(BLEND, es=DENSE), zero(stage), model=Uneven, losses=uneven_losses, batch=uneven_batch)
        weights = done.weights()
        frozen = {n: w for n, w in begun.items() if n.startswith("shift")}
        result[str(stage)] = {
            "frozen": difference(frozen, weights and {n: weights[n] for n in frozen}),
            "scale": difference({"s": begun["scale"]}, weights and {"s": weights["scale"]}),
        }
    return result


@scenario(2)
def nothing_owned_by_backprop(folder):
    """Backprop is in the file, but no phase's policy gives it a parameter in the first phase, and only some in the second."""
    phases = [
        {"steps": 2, "schedule": ONLY_ES, "policy": [REST_ES]},
        {"schedule": TURNS, "policy": [{"match": "norm", "use": ["backprop"]}, REST_ES]},
    ]
    return at_all_stages(schedule_file({"type": "phases", "phases": phases}, backprop=SGD), steps=5)


@scenario(2)
def layers_by_sensitivity(folder):
    """Layers that backprop may move are measured anew in every second step, and go from one estimator to the other."""
    policy = [
        {"layers": {"top": 1, "by": "sensitivity", "probes": 2, "every": 2}, "use": ["backprop"]},
        {"match": ".*", "use": ["es"]},
    ]
    blend = {"type": "blend", "weights": {"es": 1.0, "backprop": 1.0}}
    file = schedule_file(blend, backprop=SGD, policy=policy)
    chosen = []

    def note(run: Run) -> None:
        chosen.append(run.optimizer.ownership.chosen["policy.0"])

    result = at_all_stages(file, model=lambda: tiny_model("llama", num_hidden_layers=3), steps=5, after=note)
    result["chosen"] = [chosen[i : i + 5] for i in range(0, len(chosen), 5)]
    try:
        policy[0]["layers"] = {"top": 1, "by": "gradient_norm"}
        HybridOptimizer(small_model(), token_losses, schedule=schedule_file(blend, policy=policy), engine=zero(2))
    except UserError as error:
        result["refused"] = str(error)
    return result


@scenario(2)
def by_length(folder):
    """Long examples to ES and short ones to backprop: both, one kind alone, and fewer short ones than ranks."""
    lengths = [(3, 9, 4, 8), (9, 8), (3, 4, 5), (9, 4, 8)]

    def batch(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        return left_padded([torch.randint(3, 64, (n,), generator=generator).tolist() for n in lengths[step]], 0)

    by = {"type": "by_length", "long": "es", "short": "backprop", "length_threshold": 6, "alpha": 0.3}
    return at_all_stages(schedule_file(by, backprop=SGD), batch=batch)


# ------------------------------------------------------------ running them


def run_scenarios(folder: Path) -> None:
    """Run what is meant for this many ranks; rank 0 writes `results.json`."""
    ranks = join_ranks()
    wanted = sys.argv[2:]
    results, durations = {}, {}
    for name, (world_sizes, function) in SCENARIOS.items():
        if ranks.world_size not in world_sizes or (wanted and name not in wanted):
            continue
        place = folder / name
        place.mkdir(exist_ok=True)
        begun = time.perf_counter()
        try:
            results[name] = {"result": function(place)}
        except Exception:
            problem = traceback.format_exc()
            _end_unless_all_raise(ranks, place, problem)
            results[name] = {"error": problem}
        durations[name] = round(time.perf_counter() - begun, 1)
    if ranks.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
        print("seconds:", json.dumps(durations))


def _end_unless_all_raise(ranks, place: Path, problem: str) -> None:
    """Others that go on would wait for this rank without end, so the whole launch ends where they do not raise soon."""
    (place / f"raised-{ranks.rank}").write_text(problem)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if len(list(place.glob("raised-*"))) == ranks.world_size:
            return
        time.sleep(0.05)
    print(f"rank {ranks.rank} alone raised in {place.name}:\n{problem}", flush=True)
    os._exit(1)


if __name__ == "__main__":
    imports_are_done()
    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True  # torch computes in it on every CPU, only not faster
    run_scenarios(Path(sys.argv[1]))
