"""One step of each row of `hybrid-opt bench`, as a function without arguments. Next: `bench_generation.py`, `mezo_loop.py`, `bench.py`.

One idea: all rows see the same random tokens and the same loss, so they differ in their method alone.
"""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hybrid_opt.config.data import Data
from hybrid_opt.config.engines import LocalEngine, ZeroEngine
from hybrid_opt.config.run import Lora, Model
from hybrid_opt.errors import UserError
from hybrid_opt.models.loading import load_model
from hybrid_opt.objectives.causal_lm import CausalLmData, CausalLmObjective
from hybrid_opt.objectives.contract import Objective, to_device
from hybrid_opt.objectives.examples import Example
from hybrid_opt.studies.bench_generation import begun_alike, generation, rewarded, without_end
from hybrid_opt.studies.bench_plan import GENERATION_ROWS, Case, master_weights_of
from hybrid_opt.studies.mezo_loop import mezo_step
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer

SIGMA, LEARNING_RATE = 1e-3, 1e-6
_ADAMW = {"type": "backprop", "optimizer": "AdamW"}

Step = Callable[[], Any]
"""Takes one whole step."""


def load_for(row: str, case: Case) -> PreTrainedModel:
    """The model that a row moves, in evaluation mode on the case's device; for `lora` with adapters.

    Raises:
        UserError: the model cannot be loaded, or has no room there.
    """
    model = load_model(Model(name=case.model, dtype=case.dtype), Lora() if row == "lora" else None, seed=0)
    try:
        return model.to(case.device).eval()
    except torch.OutOfMemoryError as error:
        raise UserError(f"command line: MODEL: {case.model!r} does not fit into the memory of {case.device}") from error


def build_step(row: str, case: Case, model: nn.Module) -> Step:
    """A row's step on a model that `load_for` gave; rows without adapters may share one.

    Raises:
        UserError: the row's method does not work on this model.
    """
    if row in GENERATION_ROWS:
        return _generation(row, case, model)
    one, all_members = (token_batch(case, model, members) for members in (1, case.members))
    match row:
        case "inference":
            return _inference(model, all_members)
        case "mezo_loop":
            return _mezo(case, model, one)
        case "es_low_rank" | "es_dense":
            return _hybrid(row, case, model, one)
        case "es_stretch" | "es_stretch_moved":
            return _stretch(row, case, model, one)
    return _hybrid(row, case, model, all_members)


def build_schedule(row: str, case: Case) -> dict[str, Any]:
    """The schedule file of a row's step; in an ES stretch the first step is backprop's."""
    together = {"members_per_forward": case.members_per_forward} if case.members_per_forward else {}
    low_rank = _es(case, {"type": "low_rank", "noise_rank": 1}) | together
    estimator = {
        "es_low_rank": low_rank,
        **dict.fromkeys(GENERATION_ROWS, low_rank),
        "es_dense": _es(case, {"type": "dense", "distribution": "gaussian"}),
        "backprop_sgd": {"type": "backprop", "optimizer": "SGD"},
        "backprop_checkpointing": {**_ADAMW, "gradient_checkpointing": True},
    }.get(row, _ADAMW)
    estimators = {"it": estimator, "es": low_rank} if row.startswith("es_stretch") else {"it": estimator}
    frozen_below = [{"layers": "last-2", "use": ["it"]}, {"match": ".*", "use": "frozen"}]
    policy = {"policy": frozen_below} if row == "es_generate_shared" else {}
    return policy | {
        "estimators": {name: {**settings, "learning_rate": LEARNING_RATE} for name, settings in estimators.items()},
        "schedule": {"type": "alternate", "pattern": {"it": 1, "es": 1000}}
        if row.startswith("es_stretch")
        else {"type": "single", "estimator": "it"},
    }


def token_batch(case: Case, model: nn.Module, members: int) -> dict[str, Any]:
    """The case's random examples, repeated for each member: a batch of (members * examples, tokens) for the loss.

    The loss is the mean cross-entropy of every token but an example's first.
    """
    ids = random_tokens(case, model)
    # Rows are of one length, so the tokenizer's only part in a batch, the token to pad with, is never used.
    data = CausalLmData(Data(train="random", text="text"), SimpleNamespace(pad_token_id=0, eos_token_id=None))
    batch = data.collate([Example((), row) for row in ids.tolist()] * members)
    return to_device(batch, torch.device(case.device))


def random_tokens(case: Case, model: nn.Module) -> torch.Tensor:
    """The case's examples, (examples, tokens) int64."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(0, vocabulary, (case.examples, case.tokens), generator=torch.Generator().manual_seed(0))


def forward_arguments(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which the objective calls the model, found by stopping it at that call.

    So the plain model computes the logits that the loss needs, whichever these are.
    """
    asked: dict[str, Any] = {}

    def stop(module: nn.Module, positional: tuple, named: dict[str, Any]) -> None:
        asked.update(named)
        raise _Stopped

    handle = model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        CausalLmObjective().losses(model, batch)
    except _Stopped:
        pass
    finally:
        handle.remove()
    assert asked, "the objective is expected to call the model with named arguments"
    return asked


def problem_of(error: BaseException) -> str:
    """In a few words why a row has no result."""
    text = str(error)
    lack = (MemoryError, torch.OutOfMemoryError)
    if isinstance(error, lack) or isinstance(error.__cause__, lack) or "allocate memory" in text:
        return OUT_OF_MEMORY
    return text.splitlines()[0] if text else type(error).__name__


OUT_OF_MEMORY = "out of memory"
FAILURES = (UserError, RuntimeError, MemoryError)
"""What building a row or taking its step may raise: torch says with a RuntimeError that memory is short on the CPU."""


class _Stopped(Exception):
    """The objective has called the model."""


def _inference(model: nn.Module, batch: dict[str, Any]) -> Step:
    arguments = forward_arguments(model, batch)

    @torch.inference_mode()
    def step() -> Any:
        return model(**arguments).logits

    return step


def _mezo(case: Case, model: nn.Module, batch: dict[str, Any]) -> Step:
    parameters = [p for p in model.parameters() if p.requires_grad]
    objective, seeds = CausalLmObjective(), itertools.count()

    def step() -> Any:
        pairs = list(itertools.islice(seeds, case.members // 2))
        return mezo_step(parameters, lambda: objective.losses(model, batch).mean(), pairs, SIGMA, LEARNING_RATE)

    return step


def _es(case: Case, perturbation: dict[str, Any]) -> dict[str, Any]:
    return {"type": "es", "population_size": case.members, "sigma": SIGMA, "perturbation": perturbation}


def _generation(row: str, case: Case, model: nn.Module) -> Step:
    """A step of a row that writes: after all members' examples at once, or an ES step on the examples."""
    without_end(model)
    prompts = random_tokens(case, model)
    if row == "generate":
        return generation(model, prompts.repeat(case.members, 1).to(case.device), case.new_tokens)
    if row == "es_generate_common":
        prompts = begun_alike(prompts)
    objective, batch = rewarded(prompts, case.new_tokens)
    return _hybrid(row, case, model, to_device(batch, torch.device(case.device)), objective)


def _hybrid(row: str, case: Case, model: nn.Module, batch: dict[str, Any], objective: Objective | None = None) -> Step:
    engine = LocalEngine(type="local", device=case.device, master_weights=master_weights_of(row, case))
    schedule = build_schedule(row, case)
    hybrid = HybridOptimizer(model, objective or CausalLmObjective(), schedule=schedule, engine=engine)
    return lambda: hybrid.step(batch)


def _stretch(row: str, case: Case, model: nn.Module, batch: dict[str, Any]) -> Step:
    """An ES step some time after a backprop step, under ZeRO-2 with one rank."""
    idle = 1 if row == "es_stretch_moved" else None
    engine = ZeroEngine(type="zero", zero_stage=2, offload_idle_after=idle)
    hybrid = HybridOptimizer(model, CausalLmObjective(), schedule=build_schedule(row, case), engine=engine)
    for _ in range(2):
        hybrid.step(batch)
    return lambda: hybrid.step(batch)
