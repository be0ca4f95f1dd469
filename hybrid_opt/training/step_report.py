"""What a step tells of itself. Next: `trainer.py`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hybrid_opt.config.triggers import OF_ESTIMATORS
from hybrid_opt.estimators.contract import Cost
from hybrid_opt.recovery.records import Record
from hybrid_opt.training.profiling import Profile


@dataclass(frozen=True)
class StepReport:
    """What happened in a step."""

    step: int
    """Number of the step, from 0."""
    weights: dict[str, float]
    """The plan: weight of each estimator that acted."""
    costs: dict[str, Cost]
    """What each estimate took and saw."""
    learning_rates: dict[str, float]
    """Learning rate of each estimator that acted."""
    loss: float | None
    """The step's training loss: at the unperturbed weights if backprop acted, else the mean over the members; None if nothing was
    evaluated, no loss was finite, or only what estimators minimise instead was evaluated."""
    seconds: float
    """Duration."""
    part_seconds: dict[str, float]
    """Duration of each estimate, and of an even part of the rest."""
    record: Record | None = field(repr=False)
    """What a ledger must keep to take the step again; None where an estimator acted that does not draw noise."""
    decision: str | None = None
    """What the schedule has decided before this step because of signals, and why."""
    account: Mapping[str, Mapping[str, float]] | None = None
    """What was weighed for that, by estimator."""
    profile: Profile | None = None
    """What was measured of the layers before this step, if anything was."""
    memory: str = ""
    """What the memory budget has changed before this step or in it, and why."""

    @property
    def decisions(self) -> list[str]:
        """All that was decided before the step or in it, and why."""
        return [reason for reason in (self.decision, self.profile and self.profile.decision, self.memory) if reason]

    @property
    def forwards(self) -> int:
        """Forward passes over a batch."""
        return sum(cost.forwards for cost in self._all_costs)

    @property
    def backwards(self) -> int:
        """Backward passes over a batch."""
        return sum(cost.backwards for cost in self._all_costs)

    @property
    def forward_equivalents(self) -> float:
        """Computing, in forward passes over a whole batch (see `Cost`)."""
        return sum(cost.forward_equivalents for cost in self._all_costs)

    @property
    def tokens(self) -> int:
        """Tokens that forward passes processed."""
        return sum(cost.tokens for cost in self._all_costs)

    @property
    def _all_costs(self) -> list[Cost]:
        return [*self.costs.values(), *([self.profile.cost] if self.profile else [])]

    @property
    def measured(self) -> dict[str, float]:
        """What triggers may ask of the estimators that acted, by the names of `config.triggers`."""
        found = {}
        for name, cost in self.costs.items():
            told = {**cost.statistics, "loss": cost.loss}
            if "snr" in told:
                told["pair_correlation"] = (1 - told["snr"]) / (1 + told["snr"])
            found |= {f"{name}.{what}": told[what] for what in OF_ESTIMATORS if told.get(what) is not None}
        return found


def loss_of(costs: Iterable[Cost]) -> float | None:
    """The loss of the part that says most of the weights themselves, which is backprop's."""
    evaluated = [cost for cost in costs if cost.loss is not None]
    return max(evaluated, key=lambda cost: cost.backwards).loss if evaluated else None
