"""How many forward and backward passes, tokens and bytes between ranks a run takes. Next: `tables.py`.

One idea: ES ranks exchange a number for each member and example, and what ZeRO exchanges is known for each pass (Rajbhandari et al., ZeRO,
arXiv 1910.02054): 2 values a weight for a step of backprop at stages 1 and 2 (gradients are reduced, updated weights gathered), 3 at stage 3,
where weights are gathered for each pass through the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.run import RunFile
from hybrid_opt.scheduling.schedule import build_schedule
from hybrid_opt.scheduling.signals import Signals


@dataclass
class Totals:
    """What one estimator takes in a run."""

    steps: int = 0
    forwards: int = 0
    backwards: int = 0
    tokens: int = 0
    """At most: of batches of full length."""
    sent: int = 0
    """Bytes that a rank sends to others."""


def totals_of(
    run: RunFile,
    steps: int,
    *,
    tokens: Mapping[str, int],
    owned: Mapping[str, int],
    weights: int,
    width: int,
    world_size: int,
) -> dict[str, Totals]:
    """By estimator; of a schedule that signals decide, as if none of them came.

    Args:
        tokens: in a forward pass over a whole batch, by estimator.
        owned: values that it may move.
        weights: values of the model.
        width: bytes of a weight.
    """
    schedule, signals, found = build_schedule(run.schedule.schedule), Signals(), {}
    stage = getattr(run.engine, "zero_stage", 0)
    others = (world_size - 1) / world_size
    for step in range(steps):
        for name in schedule.plan(step, signals):
            config, total = run.schedule.estimators[name], found.setdefault(name, Totals())
            batch = run.batch_size_of(name)
            total.steps += 1
            total.forwards += config.forwards_a_step
            total.tokens += config.forwards_a_step * config.examples(batch) * tokens.get(name, 0) // batch
            if isinstance(config, Backprop):
                total.backwards += 1
                total.sent += round((3 if stage == 3 else 2) * owned[name] * width * others)
            else:
                total.sent += round(4 * config.forwards_a_step * config.examples(batch) * others)
                if stage == 3:
                    total.sent += round(config.forwards_a_step / world_size * weights * width * others)
        signals = signals.updated(loss=None)
    return found
