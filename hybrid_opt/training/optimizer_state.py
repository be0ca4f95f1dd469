"""Everything that the next step depends on, as plain values and tensors, and back again. Next: `../recovery/state_files.py`.

One idea: a state belongs to a schedule, a seed and a model, and says which, so that it is never put into others.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_opt.estimators.remembering import memories, recall
from hybrid_opt.scheduling.signals import restored
from hybrid_opt.training.refusals import refuse_other_setup

if TYPE_CHECKING:
    from hybrid_opt.training.hybrid_optimizer import HybridOptimizer


def saved(optimizer: "HybridOptimizer", folder: Path | None, *, weights: bool) -> dict[str, Any]:
    """See `HybridOptimizer.state_dict`."""
    engine, updates = optimizer.engine, optimizer.updates
    return {
        "setup": _setup(optimizer),
        "layout": engine.layout(),
        **({"engine": engine.state_dict(folder), "rules": updates.memories()} if weights else {}),
        "updates": updates.state_dict(),
        "estimators": memories(optimizer.estimators),
        "schedule": optimizer.schedule.state_dict(),
        "ownership": optimizer.ownership.state_dict(),
        "memory": optimizer.memory.state_dict() if optimizer.memory else None,
        "signals": asdict(optimizer.signals),
        "rate_factor": optimizer.rate_factor,
    }


def put_back(optimizer: "HybridOptimizer", state: Mapping[str, Any], folder: Path | None) -> None:
    """See `HybridOptimizer.load_state_dict`."""
    refuse_other_setup(state, _setup(optimizer))
    roll_back(optimizer, state, folder)
    optimizer.updates.turns.load_state_dict(state["updates"]["turns"])
    optimizer.schedule.load_state_dict(state["schedule"])
    optimizer.ownership.load_state_dict(state["ownership"])
    if optimizer.memory and state["memory"]:
        optimizer.memory.load_state_dict(state["memory"])
    optimizer.signals = restored(state["signals"])
    optimizer.rate_factor = state["rate_factor"]


def roll_back(optimizer: "HybridOptimizer", state: Mapping[str, Any], folder: Path | None) -> None:
    """See `HybridOptimizer.roll_back`."""
    optimizer.checks.forget()
    if "engine" in state:
        optimizer.engine.load_state_dict(state["engine"], folder)
        optimizer.updates.recall(state["rules"])
    optimizer.updates.trust.latest = state["updates"]["latest_change"]
    recall(optimizer.estimators, state["estimators"], optimizer.engine)


def _setup(optimizer: "HybridOptimizer") -> dict[str, Any]:
    """What a state belongs to, in plain values; the model is known by its parameters."""
    schedule = optimizer.config.model_dump(mode="json", exclude_none=True, exclude={"description"})
    return {"seed": optimizer.seed, "schedule": schedule}
