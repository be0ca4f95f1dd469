"""`hybrid-opt plan --calibrate`: seconds a step and peak memory of each estimator, from a few real steps. Next: `tables.py`.

One idea: each estimator takes three steps on the run's own model and data, thrown away afterwards; the first warms up.
"""

import tempfile
from dataclasses import dataclass
from statistics import median

import torch

from hybrid_opt.config.run import RunFile
from hybrid_opt.config.schedule import Single, acting_names
from hybrid_opt.memory import forget_peak, peak_memory_bytes, present_memory_bytes, release_memory
from hybrid_opt.training.build import build
from hybrid_opt.training.progress import Silence

STEPS = 3


@dataclass(frozen=True)
class Measured:
    """Of one estimator."""

    seconds: float
    """Median of the steps after the first."""
    peak: int
    """Bytes, on CUDA of what torch allocates, elsewhere of the process, beyond those before the model was loaded."""


def calibrated(run: RunFile, *, allow_code: bool = False) -> dict[str, Measured]:
    """Seconds and peaks of the estimators that act, each alone under the policy of the first phase in which it does.

    Raises:
        UserError: anything that `build` or a step refuses.
    """
    return {
        name: _measured(run, name, allow_code)
        for name in acting_names(run.schedule.schedule)
        if run.schedule.estimators[name].forwards_a_step
    }


def _measured(run: RunFile, name: str, allow_code: bool) -> Measured:
    training = run.training.model_copy(update={"divergence": None})
    alone = run.schedule.model_copy(update={"schedule": Single(type="single", estimator=name)})
    with tempfile.TemporaryDirectory() as folder:
        output = {"output": f"{folder}/none", "schedule": alone, "training": training, "report_to": "none"}
        before = present_memory_bytes(torch.device("cpu")) or 0
        trainer = build(run.model_copy(update=output), allow_code=allow_code, display=Silence())
    optimizer, device = trainer.optimizer, trainer.optimizer.engine.device
    batches = trainer.own_batches.get(name, trainer.batches)
    release_memory(device)
    forget_peak(device)
    seconds = [optimizer.step(batches.batch_at(step)).seconds for step in range(STEPS)]
    peak = peak_memory_bytes(device) - (before if device.type == "cpu" else 0)
    del trainer, optimizer
    release_memory(device)
    return Measured(median(seconds[1:]), peak)
