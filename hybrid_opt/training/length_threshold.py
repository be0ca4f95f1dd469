"""`length_threshold: auto`: how long examples may be for backprop to fit into the memory budget. Next: `measured_peak.py`.

One idea: the memory of a step grows with the longest example of its batch, so batches of ever longer examples are tried until one is too
large.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from hybrid_opt.config.run import RunFile
from hybrid_opt.config.schedule import Single
from hybrid_opt.errors import UserError
from hybrid_opt.machine.memory import return_freed_memory
from hybrid_opt.objectives.batches import length_of
from hybrid_opt.objectives.contract import Objective
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from hybrid_opt.training.measured_peak import largest_that_fits, peak_of_backprop

GB = 1e9


def with_threshold(run: RunFile, saved: dict[str, Any]) -> RunFile:
    """The run with the threshold that an earlier process has found, if it has `auto` and there was one.

    Args:
        saved: the configuration in the run folder; empty if there is none.
    """
    found = saved.get("schedule", {}).get("schedule", {})
    if getattr(run.schedule.schedule, "length_threshold", None) != "auto" or "length_threshold" not in found:
        return run
    return _settled(run, found["length_threshold"], found["skip_long"])


def fitted(
    run: RunFile, model: nn.Module, objective: Objective, examples: Sequence[Any], collate: Callable
) -> tuple[RunFile, str]:
    """The run with the largest threshold at which steps of its backprop stay within `training.memory_budget`, and that in words.

    Where even the longest examples fit there are none for the other estimator, and the run goes on without it (`skip_long`).

    Args:
        objective: what backprop minimises.
        examples: all training examples; collate: makes a batch of them.

    Raises:
        UserError: not even the shortest examples fit.
    """
    return_freed_memory()
    schedule, budget = run.schedule.schedule, run.training.memory_budget
    alone = run.schedule.model_copy(update={"schedule": Single(type="single", estimator=schedule.short)})
    optimizer = HybridOptimizer(model, objective, schedule=alone, engine=run.engine)
    config, names = optimizer.config.estimators[schedule.short], optimizer.policies[None].names(schedule.short)
    ordered, size = sorted(examples, key=length_of), run.batch_size_of(schedule.short)
    lengths, peaks = sorted({length_of(e) for e in ordered}), {}

    def fits(number: int) -> bool:
        """Whether the longest batch does of examples up to the length with this number."""
        length = lengths[number - 1]
        batch = collate([e for e in ordered if length_of(e) <= length][-size:])
        peaks[number] = peak_of_backprop(optimizer.engine, config, names, objective, batch)
        return peaks[number] <= budget

    most = largest_that_fits(len(lengths), fits)
    if not most:
        raise UserError(
            f"schedule.length_threshold: not even backprop on the shortest examples ({lengths[0]} tokens) fits into training.memory_budget, "
            f"{budget / GB:.4g} GB: it takes {peaks[1] / GB:.4g}; raise the budget, lower batch_size, or give backprop fewer layers by the policy"
        )
    threshold, everything = lengths[most - 1], most == len(lengths)
    longer = sum(length_of(e) > threshold for e in ordered)
    words = (
        f"length_threshold: auto is {threshold} tokens, with which backprop takes {peaks[most] / GB:.4g} of {budget / GB:.4g} GB; {longer} of the "
        f"{len(ordered)} training examples are longer" + (f", so {schedule.long} has nothing to do" * everything)
    )
    return _settled(run, threshold, schedule.skip_long or everything), words


def _settled(run: RunFile, threshold: int, skip_long: bool) -> RunFile:
    settled = run.schedule.schedule.model_copy(update={"length_threshold": threshold, "skip_long": skip_long})
    return run.model_copy(update={"schedule": run.schedule.model_copy(update={"schedule": settled})})
