"""Ownership: who may move which parameters at present, where the policy leaves it to measurements. Next: `policy.py`, `../training/profiling.py`.

One idea: an engine is built for the widest policy, which gives everybody whatever they may ever come to move, and each step uses the one
that the latest measurements have made of it. Where nothing is measured the two are one.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hybrid_opt.config.schedule import ScheduleFile
from hybrid_opt.scheduling.policy import MeasuredRule, Policy, measured_rules, policies_of, resolve_policies


class Ownership:
    """The policies of a schedule file for a model's parameter names.

    Raises:
        UserError: see `resolve_policies`.
    """

    def __init__(self, config: ScheduleFile, names: Sequence[str]) -> None:
        self.config, self.all = config, list(names)
        self.widest: dict[int | None, Policy] = resolve_policies(config, self.all)
        self.rules: dict[int | None, dict[str, MeasuredRule]] = {
            phase: measured_rules(rules, self.all, where) for phase, (where, rules) in policies_of(config).items()
        }
        self.chosen: dict[str, list[int]] = {}
        """Layers by the place of the rule that they were chosen for."""
        self.measured_at: dict[str, int] = {}
        """The step before which they were, by place."""
        self.present = self.widest
        self.limits: dict[str, frozenset[str]] = {}
        """What estimators are kept to, where there is no memory for more."""

    def names(self, phase: int | None, estimator: str) -> list[str]:
        """Parameters that an estimator may move at present, in the model's order."""
        names, limit = self.present[phase].names(estimator), self.limits.get(estimator)
        return names if limit is None else [name for name in names if name in limit]

    def limit(self, estimator: str, names: Collection[str]) -> None:
        """Keep an estimator to these parameters, of those that the policy gives it."""
        self.limits[estimator] = frozenset(names)

    def due(self, phase: int | None, step: int) -> dict[str, MeasuredRule]:
        """The rules of a phase, by their places, that are to be measured before a step."""

        def is_due(place: str, every: int) -> bool:
            at = self.measured_at.get(place)
            return at is None or bool(every and step - at >= every)

        return {place: rule for place, rule in self.rules[phase].items() if is_due(place, rule.importance.every)}

    def choose(self, place: str, values: Mapping[int, float], step: int) -> list[int]:
        """Give a rule the layers with the highest values that earlier measured rules of its policy leave, the first of equals.

        Returns:
            The layers, in rising order.
        """
        policy, _, number = place.rpartition(".")
        taken = {
            layer
            for other, layers in self.chosen.items()
            if other.rpartition(".")[0] == policy and int(other.rpartition(".")[2]) < int(number)
            for layer in layers
        }
        rule = next(rules[place] for rules in self.rules.values() if place in rules)
        ranked = sorted((layer for layer in values if layer not in taken), key=lambda layer: (-values[layer], layer))
        self.chosen[place], self.measured_at[place] = sorted(ranked[: rule.importance.top]), step
        self.present = resolve_policies(self.config, self.all, self.chosen)
        return self.chosen[place]

    def changing(self) -> list[frozenset[str]]:
        """Parameters that change owners together: for each measured rule those of each layer."""
        return [
            frozenset(names)
            for rules in self.rules.values()
            for rule in rules.values()
            for names in rule.layers.values()
        ]

    def state_dict(self) -> dict[str, Any]:
        """What was chosen, and when."""
        return {"chosen": dict(self.chosen), "measured_at": dict(self.measured_at)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.chosen = {place: list(layers) for place, layers in state["chosen"].items()}
        self.measured_at = dict(state["measured_at"])
        self.present = resolve_policies(self.config, self.all, self.chosen)
