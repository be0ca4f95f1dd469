"""The lines of `metrics.jsonl` and `evaluations.jsonl`. Next: `../training/goal.py`, `run_folder.py`."""

from collections.abc import Collection, Mapping
from typing import Any

from hybrid_opt.scheduling.signals import Signals
from hybrid_opt.training.step_report import StepReport

TOTALS = ("seconds", "tokens", "forward_equivalents")
"""What an evaluation's line says beside its measures: what the steps have taken until then."""


def metrics_row(
    report: StepReport,
    peak_memory: int,
    update_norms: dict[str, dict[str, float]],
    *,
    signals: Mapping[str, float] | None = None,
    is_reward: bool = False,
    own: Collection[str] = (),
) -> dict[str, Any]:
    """The line of a step.

    Args:
        peak_memory: most memory used during the step, in bytes.
        update_norms: see `UpdateNorms.after`.
        signals: what else triggers may ask for, by the names of `config.triggers`.
        is_reward: whether the run's objective is a reward; then the line has `reward`, which is `-loss`.
        own: estimators with an objective of their own; their parts have `own_objective`.
    """
    costs = report.costs.values()
    spreads = [cost.loss_spread for cost in costs if cost.loss_spread is not None]
    return {
        "step": report.step,
        "estimators": list(report.weights),
        "weights": report.weights,
        "loss": report.loss,
        **({"reward": None if report.loss is None else 0.0 - report.loss} if is_reward else {}),
        "losses": {name: cost.loss for name, cost in report.costs.items()},
        "loss_spread": spreads[0] if spreads else None,
        "learning_rates": report.learning_rates,
        "forwards": report.forwards,
        "backwards": report.backwards,
        "forward_equivalents": report.forward_equivalents,
        "tokens": report.tokens,
        "seconds": report.seconds,
        "peak_memory_bytes": peak_memory,
        "parts": {
            name: {
                "forwards": cost.forwards,
                "backwards": cost.backwards,
                "forward_equivalents": cost.forward_equivalents,
                "tokens": cost.tokens,
                "seconds": report.part_seconds[name],
                "statistics": dict(cost.statistics),
                **({"own_objective": True} if name in own else {}),
            }
            for name, cost in report.costs.items()
        },
        "update_norms": update_norms,
        **({"signals": dict(signals)} if signals else {}),
        **_decided(report),
        **({"account": report.account} if report.account else {}),
    }


def _decided(report: StepReport) -> dict[str, Any]:
    """What was decided before the step, and the values of layers that were measured for it, by the place of the rule."""
    decided = {"decision": "; ".join(report.decisions)} if report.decisions else {}
    if not report.profile:
        return decided
    measured = report.profile.importance.items()
    return {**decided, "importance": {place: {str(layer): v for layer, v in own.items()} for place, own in measured}}


def evaluation_row(step: int, measures: dict[str, float], signals: Signals) -> dict[str, Any]:
    """The line of an evaluation that was made after `step` steps, with what the steps have taken so far."""
    return {"step": step, **measures, **{name: getattr(signals, name) for name in TOTALS}}


def measures_of(row: dict[str, Any]) -> dict[str, float]:
    """The measures in the line of an evaluation."""
    return {name: value for name, value in row.items() if name not in ("step", *TOTALS)}
