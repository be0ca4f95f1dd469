"""`hybrid-opt plan --calibrate`: seconds a step and peak memory of each estimator, from a few real steps. Next: `tables.py`.

One idea: each estimator takes five steps on the run's own model and data, thrown away afterwards.
"""

import tempfile
from dataclasses import dataclass
from statistics import median

import torch

from hybrid_opt.config.by_length import ByLength
from hybrid_opt.config.run import RunFile
from hybrid_opt.config.schedule import Blend, Schedule, Single, acting_names
from hybrid_opt.display.progress import Silence
from hybrid_opt.machine.memory import (
    forget_peak,
    peak_memory_bytes,
    present_memory_bytes,
    release_memory,
    return_freed_memory,
)
from hybrid_opt.training.build import build

TIMED = 3
"""Steps that are timed, after two on the largest batch that tell the peak and warm up."""


@dataclass(frozen=True)
class Measured:
    """Of an estimator, or of all that act in the same steps."""

    seconds: float
    """Median of the timed steps."""
    peak: int
    """Bytes, on CUDA of what torch allocates, elsewhere of the process, beyond those before the model was loaded."""


def alone(run: RunFile) -> dict[str, RunFile]:
    """For each estimator that acts and evaluates the run with it alone, under the file's policy; and the run itself where several act in the
    same steps (by their names, joined by +)."""
    schedule = run.schedule.schedule
    names = [name for name in acting_names(schedule) if run.schedule.estimators[name].forwards_a_step]
    runs = {name: _with(run, Single(type="single", estimator=name)) for name in names}
    if isinstance(schedule, Blend | ByLength) and len(names) > 1:
        runs["+".join(names)] = _with(run, schedule)
    return runs


def _with(run: RunFile, schedule: Schedule) -> RunFile:
    training = run.training.model_copy(update={"divergence": None, "memory_budget": None})
    file = run.schedule.model_copy(update={"schedule": schedule})
    return run.model_copy(update={"schedule": file, "training": training, "report_to": "none"})


def measured(run: RunFile, *, allow_code: bool = False) -> Measured:
    """Seconds and peak of a run's first steps.

    Raises:
        UserError: anything that `build` or a step refuses.
    """
    return_freed_memory()
    before = present_memory_bytes(torch.device("cpu")) or 0
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(run.model_copy(update={"output": f"{folder}/none"}), allow_code=allow_code, display=Silence())
    optimizer, device = trainer.optimizer, trainer.optimizer.engine.device
    release_memory(device)
    forget_peak(device)
    for _ in range(2):  # the second time with the optimizers' state
        optimizer.step(trainer.batches.largest(), {name: own.largest() for name, own in trainer.own_batches.items()})
    seconds = []
    for step in range(TIMED):
        own = {name: batches.batch_at(step) for name, batches in trainer.own_batches.items()}
        seconds.append(optimizer.step(trainer.batches.batch_at(step), own).seconds)
    peak = peak_memory_bytes(device) - (before if device.type == "cpu" else 0)
    del trainer, optimizer
    release_memory(device)
    return Measured(median(seconds), peak)
