"""Policy: which estimators may move which parameters. Next: `schedule.py`.

One idea: rules are ordered and the first one that selects a parameter wins, strictly (every rule selects something) and
totally (every parameter is selected). Needs only names, so it is checked without loading a model; a rule whose layers are measured in the
run gives until then whatever it may come to give.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hybrid_opt.config.by_length import ByLength
from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.importance import Importance
from hybrid_opt.config.schedule import Blend, Phases, Rule, Schedule, ScheduleFile, acting_names
from hybrid_opt.errors import UserError

LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Policy:
    """A policy resolved against a model's parameter names."""

    owners: dict[str, tuple[str, ...]]
    """Estimators that may move each parameter; none for a frozen one."""

    def names(self, estimator: str) -> list[str]:
        """Parameters that an estimator may move, in the model's order."""
        return [name for name, estimators in self.owners.items() if estimator in estimators]


@dataclass(frozen=True)
class MeasuredRule:
    """A rule that a measurement fills in."""

    importance: Importance
    layers: dict[int, list[str]]
    """Parameters of each layer that it may select."""


def resolve(
    rules: Sequence[Rule] | None,
    names: Iterable[str],
    estimators: Collection[str],
    where: str,
    chosen: Mapping[str, Collection[int]] = {},
) -> Policy:
    """Apply rules to parameter names; without rules every estimator may move every parameter.

    Args:
        where: what the rules are called in messages, such as `policy` or `phases.1.policy`.
        chosen: layers that measurements have given to rules, by the rules' places such as `policy.0`. While a rule's are not known, a
            parameter gets every estimator that may come to move it.

    Raises:
        UserError: a rule selects nothing, a parameter is selected by no rule, or an estimator in use owns nothing.
    """
    names = list(names)
    if rules is None:
        return Policy(dict.fromkeys(names, tuple(estimators)))
    owners: dict[str, dict[str, None]] = {name: {} for name in names}
    settled: set[str] = set()
    for number, rule in enumerate(rules):
        place = f"{where}.{number}"
        layers = chosen.get(place)
        selected = _selected(rule, names, layers)
        fresh = [name for name in selected if name not in settled]
        if not fresh and rule.match != ".*":  # '.*' stands for the rest, of which there may be none
            raise UserError(f"{place}: {_nothing(rule, selected, names)}")
        if layers is not None or not isinstance(rule.layers, Importance):
            settled.update(fresh)
        for name in fresh:
            owners[name] |= dict.fromkeys(() if rule.use == "frozen" else rule.use)
    if missing := [name for name in names if name not in settled]:
        raise UserError(
            f"{where}: {len(missing)} of {len(names)} parameters are covered by no rule: {_shortened(missing)}; "
            "add a last rule such as {match: '.*', use: frozen}"
        )
    return Policy({name: tuple(owners[name]) for name in names})


def measured_rules(rules: Sequence[Rule] | None, names: Iterable[str], where: str) -> dict[str, MeasuredRule]:
    """The rules whose layers are to be measured, by their places, with the parameters that earlier rules leave to them."""
    left, found = list(names), {}
    for number, rule in enumerate(rules or ()):
        selected = _selected(rule, left)
        if isinstance(rule.layers, Importance):
            layers: dict[int, list[str]] = {}
            for name in selected:
                layers.setdefault(layer_number(name), []).append(name)
            found[f"{where}.{number}"] = MeasuredRule(rule.layers, layers)
        else:
            taken = set(selected)
            left = [name for name in left if name not in taken]
    return found


def policies_of(config: ScheduleFile) -> dict[int | None, tuple[str, Sequence[Rule] | None]]:
    """For each phase (the whole run: None) its policy's place in the file, and the rules."""
    if not isinstance(config.schedule, Phases):
        return {None: ("policy", config.policy)}
    return {
        i: (f"schedule.phases.{i}.policy", phase.policy) if phase.policy is not None else ("policy", config.policy)
        for i, phase in enumerate(config.schedule.phases)
    }


def resolve_policies(
    config: ScheduleFile, names: list[str], chosen: Mapping[str, Collection[int]] = {}
) -> dict[int | None, Policy]:
    """The policy of each phase (of the whole run: None) for a model's parameter names.

    Args:
        chosen: see `resolve`.

    Raises:
        UserError: a policy does not fit the names, an estimator acts without owning a parameter, or one that needs
            backprop's gradients shares none with it.
    """
    estimators = list(config.estimators)
    policies = {
        phase: resolve(rules, names, estimators, where, chosen) for phase, (where, rules) in policies_of(config).items()
    }
    for phase, policy in policies.items():
        for name in acting_in(config.schedule, phase):
            if not policy.names(name):
                during = "" if phase is None else f" in phase {phase}"
                raise UserError(
                    f"policy: {name!r} acts{during}, but no rule lets it move any parameter (of those with requires_grad, which alone are looked at)"
                )
    _refuse_gradients_of_others(config, policies)
    _refuse_trust_through_the_optimizer(config, policies)
    return policies


def _refuse_gradients_of_others(config: ScheduleFile, policies: dict[int | None, Policy]) -> None:
    """Of parameters that backprop never moves there is never a gradient to be used again."""
    acting = acting_names(config.schedule)
    fresh = config.acting_backprop
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
        together = list(schedule.weights) if isinstance(schedule, Blend | ByLength) else []
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
    found = LAYER.search(name)
    return int(found[1]) if found else None


def block_of(name: str) -> str:
    """Where a parameter lies on the way through the model: its name up to its layer's number, or nothing outside of layers."""
    found = LAYER.search(name)
    return name[: found.end()] if found else ""


def _selected(rule: Rule, names: Sequence[str], chosen: Collection[int] | None = None) -> list[str]:
    if rule.match is not None:
        return [name for name in names if re.search(rule.match, name)]
    if isinstance(rule.layers, Importance):
        numbers = {name: layer_number(name) for name in names}
        return [n for n, layer in numbers.items() if layer is not None and (chosen is None or layer in chosen)]
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
