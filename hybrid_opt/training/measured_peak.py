"""The peak memory of backprop steps, measured by taking them and taking them back. Next: `memory_budget.py`, `length_threshold.py`.

One idea: what a step takes is known best by taking one. Weights and the optimizer's state are then put back to what they were, bit by bit.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.engines.contract import Contribution
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.estimators.backprop import BackpropEstimator
from hybrid_opt.machine.memory import forget_peak, peak_memory_bytes, release_memory
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Objective


def peak_of_backprop(
    engine: LocalEngine, config: Backprop, names: Sequence[str], objective: Objective, batch: Any
) -> float:
    """Bytes (on CUDA of what torch allocates, elsewhere of the process) at the peak of a step once the optimizer has its state: the second
    of two, with learning rate 0; infinite if the device has less.

    Args:
        names: parameters that backprop owns.
    """
    saved = {shard.name: shard.data.to("cpu", copy=True) for shard in engine.shards(names)}
    copies = sum(t.nbytes for t in saved.values()) if engine.device.type == "cpu" else 0
    try:
        for _ in range(2):
            release_memory(engine.device)
            forget_peak(engine.device)
            gradient, _ = BackpropEstimator(config).estimate(engine, objective, batch, names, StepKey(0, 0, "measured"))
            engine.apply([Contribution(gradient, 1.0, names, 0.0, None)], step=0)
            del gradient
        return peak_memory_bytes(engine.device) - copies
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        engine.write(saved)
        engine.after_rest("reset", 0)
        release_memory(engine.device)


def largest_that_fits(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `most` that fits, where all below one that fits do; 0 if none does.

    Upwards in doubles, so that nothing much larger than what fits is ever tried; then between the last that did and the first that did not.
    """
    good, bad = 0, most + 1
    while good + 1 < bad:
        trying = min(2 * good or 1, most) if bad > most else (good + bad) // 2
        good, bad = (trying, bad) if fits(trying) else (good, trying)
    return good
