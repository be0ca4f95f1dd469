"""Schedule: which estimators act at a step, and with what weight. Next: `adaptive.py`, `learning_rate.py`.

One idea: a schedule answers `plan(step, signals) -> {estimator: weight}`, and an estimator that is not in the answer
rests. All the mixing there is lies in this dictionary.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from hybrid_opt.config import schedule as config
from hybrid_opt.config.adaptive import Adaptive
from hybrid_opt.config.by_length import ByLength
from hybrid_opt.scheduling.adaptive import AdaptiveSchedule
from hybrid_opt.scheduling.signals import Signals, restored

Plan = dict[str, float]
"""Weight of each estimator that acts."""


class Schedule(Protocol):
    """Decides who acts at each step; deterministic, given the signals."""

    phase: int | None
    """Number of the phase that the latest plan belongs to; None in a schedule without phases."""
    reason: str | None
    """Why the latest plan begins something new, where signals have decided it."""
    account: Mapping[str, Mapping[str, float]] | None
    """What was weighed for that, by estimator."""
    mark: int | None
    """The step after which the weights were that it may want to go back to; None: none are."""
    goes_back: int | None
    """The step at whose weights the latest plan wants to go on; None: at those that there are."""

    def asks(self, signals: Signals) -> bool:
        """Whether the probe loss (`probe_loss`) must be told before the next plan."""
        ...

    def plan(self, step: int, signals: Signals) -> Plan:
        """Who acts at a step (0-based; steps are asked for in order, one perhaps more than once)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a schedule remembers, in plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        ...


Fixed = config.Single | config.Alternate | config.Blend | ByLength


def plan_of(schedule: Fixed, step: int) -> Plan:
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
        case ByLength():
            return schedule.weights
    raise AssertionError(schedule)


def _weight(weight: float | config.Ramp, step: int) -> float:
    if isinstance(weight, config.Ramp):
        return weight.start + (weight.end - weight.start) * min(1.0, step / weight.over)
    return weight


class FixedSchedule:
    """Single, alternate, blend or by_length: decided by the step alone."""

    phase: int | None = None
    reason = account = mark = goes_back = None

    def __init__(self, schedule: Fixed) -> None:
        self.schedule = schedule

    def asks(self, signals: Signals) -> bool:
        """Never."""
        return False

    def plan(self, step: int, signals: Signals) -> Plan:
        """See `Schedule.plan`."""
        return plan_of(self.schedule, step)

    def state_dict(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is remembered."""


class PhasedSchedule:
    """Schedules one after another, each counting its steps from the start of its phase."""

    account = mark = goes_back = None

    def __init__(self, schedule: config.Phases) -> None:
        self.schedule = schedule
        self.phase = 0
        self.reason: str | None = None
        self.start = Signals()
        """The signals when the phase began."""
        self.in_a_row = 0
        """Measurements in a row, up to the latest, that met the phase's trigger."""
        self.silent: dict[int, int] = {}
        """Phases, and the step before which their triggers may not end them again."""
        self.planned = -1
        """The step of the latest plan."""

    def asks(self, signals: Signals) -> bool:
        """Never."""
        return False

    def plan(self, step: int, signals: Signals) -> Plan:
        """See `Schedule.plan`. After the end of the last phase it goes on."""
        if step > self.planned:
            self.planned, self.reason = step, None
            following = self.schedule.following(self.phase)
            if following is not None and (reason := self._over(step, signals)):
                self._enter(following, signals, reason)
        return plan_of(self.schedule.phases[self.phase].schedule, step - self.start.step)

    def _enter(self, number: int, signals: Signals, reason: str) -> None:
        self.reason = f"phase {number} after {reason}"
        self.silent[self.phase] = signals.step + self.schedule.phases[self.phase].cool_down
        self.phase, self.start, self.in_a_row = number, signals, 0

    def _over(self, step: int, signals: Signals) -> str:
        """Why the phase is over; empty while it is not."""
        phase, length = self.schedule.phases[self.phase], step - self.start.step
        if phase.steps is not None:
            return f"{length} steps" if length >= phase.steps else ""
        if phase.tokens is not None:
            tokens = signals.tokens - self.start.tokens
            return f"{tokens:,} tokens" if tokens >= phase.tokens else ""
        return self._triggered(phase, length, signals) if phase.until and length else ""

    def _triggered(self, phase: config.Phase, length: int, signals: Signals) -> str:
        value = signals.value(phase.until.signal, self.start)
        if value is not None:
            self.in_a_row = self.in_a_row + 1 if phase.until.is_met(value) else 0
        if phase.at_most and length >= phase.at_most:
            return f"{length} steps, the most"
        is_silent = length < (phase.at_least or 0) or signals.step < self.silent.get(self.phase, 0)
        if is_silent or self.in_a_row < phase.until.in_a_row:
            return ""
        return f"{phase.until}" + ("" if value is None else f" (now {value:.4g})")

    def state_dict(self) -> dict[str, Any]:
        """Where the current phase began, and what its trigger has seen."""
        return {
            "phase": self.phase,
            "reason": self.reason,
            "start": asdict(self.start),
            "in_a_row": self.in_a_row,
            "silent": [[phase, step] for phase, step in self.silent.items()],
            "planned": self.planned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.phase, self.reason, self.start = state["phase"], state["reason"], restored(state["start"])
        self.in_a_row, self.planned = state["in_a_row"], state["planned"]
        self.silent = dict(state["silent"])


def build_schedule(schedule: config.AnySchedule) -> Schedule:
    """The schedule that a configuration describes, at its beginning."""
    if isinstance(schedule, config.Phases):
        return PhasedSchedule(schedule)
    if isinstance(schedule, Adaptive):
        return AdaptiveSchedule(schedule)
    return FixedSchedule(schedule)
