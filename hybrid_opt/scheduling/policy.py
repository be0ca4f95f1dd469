"""Policy: which estimators may move which parameters. Next: `schedule.py`.

One idea: rules are ordered and the first one that selects a parameter wins, strictly (every rule selects something) and
totally (every parameter is selected). Needs only names, so it is checked without loading a model.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.schedule import Blend, Phases, Rule, Schedule, ScheduleFile, acting_names
from hybrid_opt.errors import UserError


@dataclass(frozen=True)
class Policy:
    """A policy resolved against a model's parameter names."""

    owners: dict[str, tuple[str, ...]]
    """Estimators that may move each parameter; none for a frozen one."""

    def names(self, estimator: str) -> list[str]:
        """Parameters that an estimator may move, in the model's order."""
        return [name for name, estimators in self.owners.items() if estimator in estimators]


def resolve(rules: Sequence[Rule] | None, names: Iterable[str], estimators: Collection[str], where: str) -> Policy:
    """Apply rules to parameter names; without rules every estimator may move every parameter.

    Args:
        where: what the rules are called in messages, such as `policy` or `phases.1.policy`.

    Raises:
        UserError: a rule selects nothing, a parameter is selected by no rule, or an estimator in use owns nothing.
    """
    names = list(names)
    if rules is None:
        return Policy(dict.fromkeys(names, tuple(estimators)))
    owners: dict[str, tuple[str, ...]] = {}
    for number, rule in enumerate(rules):
        selected = _selected(rule, names)
        fresh = [name for name in selected if name not in owners]
        if not fresh and rule.match != ".*":  # '.*' stands for the rest, of which there may be none
            raise UserError(f"{where}.{number}: {_nothing(rule, selected, names)}")
        owners.update(dict.fromkeys(fresh, () if rule.use == "frozen" else tuple(rule.use)))
    if missing := [name for name in names if name not in owners]:
        raise UserError(
            f"{where}: {len(missing)} of {len(names)} parameters are covered by no rule: {_shortened(missing)}; "
            "add a last rule such as {match: '.*', use: frozen}"
        )
    return Policy({name: owners[name] for name in names})


def resolve_policies(config: ScheduleFile, names: list[str]) -> dict[int | None, Policy]:
    """The policy of each phase (of the whole run: None) for a model's parameter names.

    Raises:
        UserError: a policy does not fit the names, an estimator acts without owning a parameter, or one that needs
            backprop's gradients shares none with it.
    """
    estimators = list(config.estimators)
    if not isinstance(config.schedule, Phases):
        policies = {None: resolve(config.policy, names, estimators, "policy")}
    else:
        policies = {}
        for i, phase in enumerate(config.schedule.phases):
            own = phase.policy is not None
            rules, where = (phase.policy, f"schedule.phases.{i}.policy") if own else (config.policy, "policy")
            policies[i] = resolve(rules, names, estimators, where)
    for phase, policy in policies.items():
        for name in acting_in(config.schedule, phase):
            if not policy.names(name):
                during = "" if phase is None else f" in phase {phase}"
                raise UserError(f"policy: {name!r} acts{during}, but no rule lets it move any parameter")
    _refuse_gradients_of_others(config, policies)
    _refuse_trust_through_the_optimizer(config, policies)
    return policies


def _refuse_gradients_of_others(config: ScheduleFile, policies: dict[int | None, Policy]) -> None:
    """Of parameters that backprop never moves there is never a gradient to be used again."""
    acting = acting_names(config.schedule)
    fresh = next((name for name in acting if isinstance(config.estimators[name], Backprop)), None)
    for name in (name for name in acting if config.estimators[name].needs_gradient):
        if may_ever_move(config, policies, name).isdisjoint(may_ever_move(config, policies, fresh)):
            raise UserError(
                f"policy: {name!r} uses gradients of {fresh!r} again, but no rule lets both move the same parameter; "
                f"write use: [{fresh}, {name}]"
            )


def _refuse_trust_through_the_optimizer(config: ScheduleFile, policies: dict[int | None, Policy]) -> None:
    """Where backprop acts on the same parameters the optimizer makes one update of both, in which nobody's part has a length."""
    for phase, policy in policies.items():
        schedule = config.schedule if phase is None else config.schedule.phases[phase].schedule
        together = list(schedule.weights) if isinstance(schedule, Blend) else []
        fresh = {p for name in together if isinstance(config.estimators[name], Backprop) for p in policy.names(name)}
        for name in together:
            if getattr(config.estimators[name], "trust", None) and not fresh.isdisjoint(policy.names(name)):
                raise UserError(
                    f"estimators.{name}.trust: {name!r} acts in the same steps as backprop on the same parameters, where the optimizer makes one "
                    "update of both; drop trust and give it a weight, use alternate or phases, or parameters of its own (policy)"
                )


def may_ever_move(config: ScheduleFile, policies: dict[int | None, Policy], estimator: str) -> frozenset[str]:
    """Parameters that an estimator may move in some phase in which it acts."""
    acts = [policy for phase, policy in policies.items() if estimator in acting_in(config.schedule, phase)]
    return frozenset(name for policy in acts for name in policy.names(estimator))


def acting_in(schedule: Schedule, phase: int | None) -> list[str]:
    """Names of the estimators that act in a phase (in the whole run: None)."""
    return acting_names(schedule if phase is None else schedule.phases[phase].schedule)


def layer_number(name: str) -> int | None:
    """The number of the layer in a parameter's name (`model.layers.7.mlp.weight` -> 7), or None."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else None


def _selected(rule: Rule, names: Sequence[str]) -> list[str]:
    if rule.match is not None:
        return [name for name in names if re.search(rule.match, name)]
    layers = _layers(rule.layers, names)
    return [name for name in names if layer_number(name) in layers]


def _layers(layers: str, names: Sequence[str]) -> range:
    first, _, last = layers.partition("-")
    if first == "first":
        return range(int(last))
    if first == "last":
        count = max((n for name in names if (n := layer_number(name)) is not None), default=-1) + 1
        return range(max(0, count - int(last)), count)
    return range(int(first), int(last or first) + 1)


def _nothing(rule: Rule, selected: Sequence[str], names: Sequence[str]) -> str:
    shown = f"match {rule.match!r}" if rule.match is not None else f"layers {rule.layers}"
    if selected:
        return f"{shown} selects only parameters that earlier rules have taken: {_shortened(selected)}; move it up or drop it"
    if rule.match is None:
        numbers = sorted({n for name in names if (n := layer_number(name)) is not None})
        has = f"layers {numbers[0]} to {numbers[-1]}" if numbers else "no numbered layers"
        return f"{shown} selects no parameter; the model has {has}"
    return f"{shown} selects no parameter; nearest names: {_shortened(_nearest(rule.match, names))}"


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Names with the most similar part to the pattern's words, one for each kind of layer."""
    words = re.sub(r"[^\w.]|\\.", "", pattern)
    kinds = list({re.sub(r"\d+", "N", name): name for name in reversed(names)}.values())

    def similarity(name: str) -> float:
        parts = [name, *name.split(".")]
        return max(difflib.SequenceMatcher(None, words, part).ratio() for part in parts)

    return sorted(kinds, key=similarity, reverse=True)[:3]


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
