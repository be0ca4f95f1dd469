"""Schedule: which estimators act at a step, and with what weight. Next: `learning_rate.py`.

One idea: a schedule answers `plan(step, signals) -> {estimator: weight}`, and an estimator that is not in the answer
rests. All the mixing there is lies in this dictionary.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from hybrid_opt.config import schedule as config
from hybrid_opt.scheduling.signals import Signals

Plan = dict[str, float]
"""Weight of each estimator that acts."""


class Schedule(Protocol):
    """Decides who acts at each step; deterministic, given the signals."""

    phase: int | None
    """Number of the phase that the latest plan belongs to; None in a schedule without phases."""

    def plan(self, step: int, signals: Signals) -> Plan:
        """Who acts at a step (0-based; steps are asked for in order)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a schedule remembers, in plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        ...


def plan_of(schedule: config.Single | config.Alternate | config.Blend, step: int) -> Plan:
    """The plan of a schedule that depends on the step alone."""
    match schedule:
        case config.Single():
            return {schedule.estimator: 1.0}
        case config.Alternate():
            turn = step % sum(schedule.pattern.values())
            for name, length in schedule.pattern.items():
                if turn < length:
                    return {name: 1.0}
                turn -= length
        case config.Blend():
            weights = {name: _weight(w, step) for name, w in schedule.weights.items()}
            return {name: w for name, w in weights.items() if w > 0}
    raise AssertionError(schedule)


def _weight(weight: float | config.Ramp, step: int) -> float:
    if isinstance(weight, config.Ramp):
        return weight.start + (weight.end - weight.start) * min(1.0, step / weight.over)
    return weight


class FixedSchedule:
    """Single, alternate or blend: decided by the step alone."""

    phase: int | None = None

    def __init__(self, schedule: config.Single | config.Alternate | config.Blend):
        self.schedule = schedule

    def plan(self, step: int, signals: Signals) -> Plan:
        """See `Schedule.plan`."""
        return plan_of(self.schedule, step)

    def state_dict(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is remembered."""


@dataclass
class PhasedSchedule:
    """Schedules one after another, each counting its steps from the start of its phase."""

    phases: tuple[config.Phase, ...]
    phase: int = 0
    start_step: int = 0
    start_tokens: int = 0

    def plan(self, step: int, signals: Signals) -> Plan:
        """See `Schedule.plan`. After the end of the last phase it goes on."""
        if self.phase < len(self.phases) - 1 and self._over(step, signals):
            self.phase, self.start_step, self.start_tokens = self.phase + 1, step, signals.tokens
        return plan_of(self.phases[self.phase].schedule, step - self.start_step)

    def _over(self, step: int, signals: Signals) -> bool:
        phase = self.phases[self.phase]
        if phase.steps is not None:
            return step - self.start_step >= phase.steps
        return signals.tokens - self.start_tokens >= phase.tokens

    def state_dict(self) -> dict[str, Any]:
        """Where the current phase began."""
        return {"phase": self.phase, "start_step": self.start_step, "start_tokens": self.start_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.phase, self.start_step, self.start_tokens = state["phase"], state["start_step"], state["start_tokens"]


def build_schedule(schedule: config.Single | config.Alternate | config.Blend | config.Phases) -> Schedule:
    """The schedule that a configuration describes, at its beginning."""
    if isinstance(schedule, config.Phases):
        return PhasedSchedule(schedule.phases)
    return FixedSchedule(schedule)
