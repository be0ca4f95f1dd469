"""From estimates to updates: at what rate and by which rule each estimator moves weights. Next: `../scheduling/turns.py`, `trust.py`.

One idea: estimators that take turns on the same weights are coupled by three numbers only, how long one has acted, how long it has rested,
and how far backprop has just moved; each changes a learning rate or a memory before the step, and so stands in the step's record.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.schedule import ScheduleFile, acting_names
from hybrid_opt.engines.contract import Contribution, Engine
from hybrid_opt.engines.update_rules import Sgd, UpdateRule, build_rule
from hybrid_opt.estimators.anchor import Anchor
from hybrid_opt.estimators.contract import Estimate, WeightedSum
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.recovery.records import Part, Record
from hybrid_opt.scheduling.learning_rate import learning_rate_of
from hybrid_opt.scheduling.policy import Policy, may_ever_move
from hybrid_opt.scheduling.turns import Turns
from hybrid_opt.training.trust import Trust


@dataclass(frozen=True)
class Update:
    """What one estimator does to the weights in a step; a record's `Part` is the same without a gradient."""

    estimator: str
    estimate: Estimate
    weight: float
    learning_rate: float
    names: Sequence[str]
    rested: int = 0
    """Steps of a rest that its memory is yet to be told of."""


def record_of(step: int, policy: str, updates: Iterable[Update], seed: int) -> Record:
    """The record of a step in which none but estimators acted that draw noise.

    Args:
        policy: digest of the phase's policy.
    """
    return Record(
        step,
        policy,
        [
            Part.of(
                u.estimator, u.estimate, u.weight, u.learning_rate, u.names, StepKey(seed, step, u.estimator), u.rested
            )
            for u in updates
        ],
    )


class Updates:
    """Rules, rates and anchors of a schedule file's estimators, and what couples them.

    Args:
        engine: holds the weights, which are the first ones now.
        policies: by phase.
        steps: length of the run, for learning rates that change over it.
    """

    def __init__(
        self, config: ScheduleFile, engine: Engine, policies: Mapping[int | None, Policy], steps: int | None
    ) -> None:
        self.estimators, self.engine = config.estimators, engine
        self.rules: dict[str, UpdateRule | None] = {
            name: None if isinstance(c, Backprop) else build_rule(c.update) for name, c in self.estimators.items()
        }
        self.anchor = Anchor(engine, _anchored(config, policies))
        self.learning_rates = {name: learning_rate_of(name, c, steps) for name, c in self.estimators.items()}
        self.turns = Turns(self.estimators)
        limits = [getattr(self.estimators[name], "trust", None) for name in acting_names(config.schedule)]
        self.trust = Trust(engine, is_asked=any(limits))

    def rates(self, names: Iterable[str], step: int) -> dict[str, float]:
        """The learning rates of those that act in a step, before anything limits them."""
        warmth = {name: self.turns.warmth(name, self.estimators[name].warmup_after_switch) for name in names}
        return {name: factor * self.learning_rates[name](step) for name, factor in warmth.items()}

    def coupled(self, updates: Iterable[Update]) -> tuple[list[Update], dict[str, float]]:
        """Treat memories after a rest, and lower the rates of those whose update would be too long.

        Returns:
            The updates to make, and for each estimator with a limit what its learning rate was multiplied by.
        """
        coupled, factors = [], {}
        for update in updates:
            name, config = update.estimator, self.estimators[update.estimator]
            if config.state_on_switch != "keep":
                update = replace(update, rested=self.turns.rested[name])
            self.after_rest(update)
            if trust := getattr(config, "trust", None):
                (own,) = self._contributions(update)
                factors[name] = self.trust.factor(trust, own)
                update = replace(update, learning_rate=update.learning_rate * factors[name])
            coupled.append(update)
        return coupled, factors

    def after_rest(self, update: Update | Part) -> None:
        """Let the memory of an estimator know how long it has rested."""
        if update.rested:
            memory = self.rules[update.estimator] or self.engine
            memory.after_rest(self.estimators[update.estimator].state_on_switch, update.rested)

    def apply(self, updates: Sequence[Update | Part], step: int) -> None:
        """Move the weights."""
        exact = {name for update in updates if self.rules[update.estimator] is None for name in update.names}
        with self.trust.measured(exact):
            self.engine.apply([part for update in updates for part in self._contributions(update)], step)

    def state_dict(self) -> dict[str, Any]:
        """What couples the estimators."""
        return {"turns": self.turns.state_dict(), "latest_change": self.trust.latest}

    def memories(self) -> dict[str, Any]:
        """What the rules remember on this rank."""
        return {name: rule.state_dict() for name, rule in self.rules.items() if rule is not None}

    def recall(self, state: Mapping[str, Any]) -> None:
        """Put back what `memories` gave."""
        for name, rule in self.rules.items():
            if rule is not None:
                rule.load_state_dict(state[name])

    def _contributions(self, update: Update | Part) -> Iterator[Contribution]:
        """An estimator's part in a step, with the pull of its anchor."""
        strength, rule = getattr(self.estimators[update.estimator], "anchor", 0.0), self.rules[update.estimator]
        estimate, weight, names, rate = update.estimate, update.weight, update.names, update.learning_rate
        if strength and rule is not None:  # the pull first: it is to see the weights as they were
            estimate = WeightedSum([(strength, self.anchor), (1.0, estimate)])
        yield Contribution(estimate, weight, names, rate, rule)
        if strength and rule is None:  # the engine adds it to the gradient, which not every engine can read here
            yield Contribution(self.anchor, weight * strength, names, rate, Sgd())


def _anchored(config: ScheduleFile, policies: Mapping[int | None, Policy]) -> Collection[str]:
    """Parameters that are ever pulled back to where they were."""
    acting = acting_names(config.schedule)
    names = [name for name in acting if getattr(config.estimators[name], "anchor", 0.0)]
    return frozenset().union(*(may_ever_move(config, policies, name) for name in names))
