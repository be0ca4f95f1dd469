"""What `check` and `plan` show: who may move what, and who acts when. No torch, no weights. Next: `../scheduling/policy.py`."""

import math
from collections.abc import Collection, Iterator

from rich.table import Column, Table
from rich.text import Text

from hybrid_opt.config.adaptive import Adaptive
from hybrid_opt.config.engines import ZeroEngine
from hybrid_opt.config.estimators import Backprop, StaleGradient
from hybrid_opt.config.objectives import Objective
from hybrid_opt.config.perturbations import LowRankPerturbation
from hybrid_opt.config.rewards import Reward
from hybrid_opt.config.run import RunFile
from hybrid_opt.config.schedule import ScheduleFile, acting_names
from hybrid_opt.engines.deepspeed_config import DeepSpeedSettings
from hybrid_opt.errors import UserError
from hybrid_opt.models.inventory import inventory
from hybrid_opt.perturbations.refusal import refusal
from hybrid_opt.scheduling.policy import Policy, may_ever_move, measured_rules, policies_of, resolve_policies
from hybrid_opt.scheduling.schedule import build_schedule
from hybrid_opt.scheduling.signals import Signals


def policy_tables(run: RunFile) -> Iterator[Table | Text]:
    """For each phase: groups of parameters of the same kind -> the estimators that may move them, with counts.

    Then a line for each kind of parameter that an estimator's low rank noise cannot reach, with the reason and what is done.

    Raises:
        UserError: a policy does not fit the model, or low rank noise cannot reach a parameter and nothing is said to do then.
    """
    found = inventory(run.model, run.peft)
    exceptions: dict[str, None] = {}
    for phase, policy in resolve_policies(run.schedule, list(found.shapes)).items():
        for estimator in acting_names(run.schedule.schedule):
            form = getattr(run.schedule.estimators[estimator], "perturbation", None)
            reasons = {name: found.not_low_rank[name] for name in policy.names(estimator) if name in found.not_low_rank}
            if reasons and isinstance(form, LowRankPerturbation):
                exceptions |= dict.fromkeys(_exceptions(estimator, form.otherwise, reasons))
                policy = _without(policy, estimator, reasons) if form.otherwise == "frozen" else policy
        yield _policy_table(policy, found.shapes, "" if phase is None else f"phase {phase}")
    yield from map(Text, _measured(run.schedule, list(found.shapes)))
    yield from map(Text, exceptions)


def _measured(schedule: ScheduleFile, names: list[str]) -> list[str]:
    """Which of the rules choose their layers in the run; the table shows whoever may come to move a parameter."""
    lines = {}
    for where, rules in policies_of(schedule).values():
        for place, rule in measured_rules(rules, names, where).items():
            importance, count = rule.importance, len(rule.layers)
            again = f"every {importance.every} steps" if importance.every else "once"
            takes = (
                "a backward pass"
                if importance.by == "gradient_norm"
                else f"{2 * importance.probes * count:,} forward passes"
            )
            lines[place] = (
                f"{place}: {importance}, of {count} layers, measured in the run {again} by {takes}; the table shows whoever may come to move a "
                "parameter"
            )
    return list(lines.values())


def objective_lines(run: RunFile) -> Iterator[Text]:
    """What each estimator is after, and what is evaluated; nothing where all minimise one loss."""
    if not run.objectives and not isinstance(run.objective, Reward):
        return
    for name in acting_names(run.schedule.schedule):
        if isinstance(run.schedule.estimators[name], StaleGradient):
            continue
        own = run.objectives.get(name)
        data = " on data of its own" if own and own.data else ""
        yield Text(f"{name} {_aim(run.objective_of(name))}{data}, {run.batch_size_of(name)} examples a batch")
    measured = "the reward" if isinstance(run.objective, Reward) else run.objective.type
    yield Text(f"evaluations measure {measured}, whoever acts")


def _aim(objective: Objective) -> str:
    if not isinstance(objective, Reward):
        return f"minimises {getattr(objective, 'function', objective.type)}"
    sum_ = " + ".join(
        f"{judge.weight:g} {judge.function}" if judge.weight != 1 else judge.function for judge in objective.rewards
    )
    return f"maximises the reward {sum_}"


def engine_notes(run: RunFile) -> Iterator[Text]:
    """Under ZeRO, what the policy saves: only what backprop may own has optimizer state and masters there.

    Raises:
        UserError: the `engine` section, its DeepSpeed file and the rest of the run contradict each other.
    """
    if not isinstance(run.engine, ZeroEngine):
        return
    settings = DeepSpeedSettings(run.engine)
    settings.dtype(run.model.dtype, given="dtype" in run.model.model_fields_set)
    shapes = inventory(run.model, run.peft).shapes
    policies = resolve_policies(run.schedule, list(shapes)).values()
    for name, estimator in run.schedule.estimators.items():
        if not isinstance(estimator, Backprop):
            continue
        settings.backprop(estimator)
        owned = {parameter for policy in policies for parameter in policy.names(name)}
        bytes_each = 4 * (1 + estimator.state_values)
        values, everything = (sum(math.prod(shapes[p]) for p in names) for names in (owned, shapes))
        yield Text(
            f"zero: {name} may own {values:,} of {everything:,} values; {estimator.optimizer}'s state and float32 masters take "
            f"{size(values * bytes_each)} over all ranks, where for all values they would take {size(everything * bytes_each)}"
        )


def size(count: float) -> str:
    """Bytes in kilobytes, megabytes or gigabytes."""
    for unit, least, divisor in (("GB", 1e9, 1e9), ("MB", 1e5, 1e6)):
        if count >= least:
            return f"{count / divisor:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _exceptions(estimator: str, otherwise: str, reasons: dict[str, str]) -> Iterator[str]:
    for name, reason in reasons.items():
        if otherwise == "refuse":
            raise UserError(refusal(name, reason))
    done = "dense noise, one member a forward pass" if otherwise == "dense" else "left frozen"
    for kind, reason in dict.fromkeys((_kind(name), reason) for name, reason in reasons.items()):
        yield f"{estimator}: {kind}: {done}, because {reason}"


def _without(policy: Policy, estimator: str, names: Collection[str]) -> Policy:
    return Policy(
        {
            name: tuple(who for who in owners if who != estimator or name not in names)
            for name, owners in policy.owners.items()
        }
    )


def _kind(name: str) -> str:
    """A parameter's name without the numbers of layers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _policy_table(policy: Policy, shapes: dict[str, tuple[int, ...]], title: str) -> Table:
    table = Table(
        Column("parameters", overflow="fold"),
        "tensors",
        "values",
        "moved by",
        title=title or None,
        title_justify="left",
    )
    for column in table.columns[1:3]:
        column.justify = "right"
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, estimators in policy.owners.items():
        groups.setdefault((_kind(name), estimators), []).append(name)
    for (kind, estimators), names in groups.items():
        values = sum(math.prod(shapes[name]) for name in names)
        table.add_row(kind, f"{len(names):,}", f"{values:,}", ", ".join(estimators) or "frozen")
    table.add_section()
    for name in dict.fromkeys(e for estimators in policy.owners.values() for e in estimators):
        owned = policy.names(name)
        table.add_row(f"all of {name}", f"{len(owned):,}", f"{sum(math.prod(shapes[n]) for n in owned):,}", name)
    return table


def cost_table(run: RunFile) -> Table:
    """For each estimator that acts: forward passes a step, examples in each, and memory beyond that of inference."""
    table = Table("estimator", "forwards a step", "backwards", "examples in each", "memory beyond inference")
    for column in table.columns[1:4]:
        column.justify = "right"
    shapes = inventory(run.model, run.peft).shapes
    policies = resolve_policies(run.schedule, list(shapes))
    for name in acting_names(run.schedule.schedule):
        estimator = run.schedule.estimators[name]
        moved = may_ever_move(run.schedule, policies, name)
        kept = estimator.keeps({parameter: shapes[parameter] for parameter in moved})
        backwards = int(isinstance(estimator, Backprop))
        memory = [f"{size(count)} {what}" for what, count in kept.items()] + ["activations"] * backwards
        examples = estimator.examples(run.batch_size_of(name))
        row = (estimator.forwards_a_step, backwards, examples or "")
        table.add_row(name, *map(str, row), "\n".join(memory) or "none")
    return table


def timeline(run: RunFile, steps: int) -> Iterator[Text]:
    """One line for each stretch of steps in which the same estimators act with the same weights."""
    if isinstance(run.schedule.schedule, Adaptive):
        yield from _blocks(run, run.schedule.schedule)
        return
    schedule, signals = build_schedule(run.schedule.schedule), Signals()
    by_tokens = any(phase.tokens for phase in run.schedule.phases)
    stretches: list[tuple[int, int, str]] = []
    for step in range(steps):
        weights = schedule.plan(step, signals)
        who = " + ".join(f"{weight:.3g} {name}" if weight != 1 else name for name, weight in weights.items())
        who += "" if schedule.phase is None else f"  (phase {schedule.phase})"
        if stretches and stretches[-1][2] == who:
            stretches[-1] = (stretches[-1][0], step, who)
        else:
            stretches.append((step, step, who))
        acting = {name: run.schedule.estimators[name] for name in weights}
        signals = signals.updated(
            tokens=sum(
                e.forwards_a_step * e.examples(run.batch_size_of(n)) * _longest(run, n) for n, e in acting.items()
            ),
            forwards=sum(e.forwards_a_step for e in acting.values()),
            loss=None,
        )
    width = len(str(steps - 1))
    for first, last, who in stretches:
        steps_text = f"step  {first:>{width}}" if first == last else f"steps {first:>{width}} to {last:>{width}}"
        yield Text(f"{steps_text:<{2 * width + 11}} {who}")
    for number, phase in enumerate(run.schedule.phases):
        if phase.until:
            most = f", at the latest after {phase.at_most} steps" if phase.at_most else ""
            follows = run.schedule.schedule.following(number)
            yield Text(
                f"(phase {number} ends when {phase.until}{most}; phase {follows} follows. Signals are known only in the run)"
            )
    if by_tokens:
        yield Text("(phases given in tokens: their ends are estimated from batches of full length)")


def _blocks(run: RunFile, schedule: Adaptive) -> Iterator[Text]:
    """How long blocks of a schedule are that decides in the run whose they are."""
    yield Text(
        f"blocks of {schedule.block:g} forward equivalents, each of the estimator that pays most per {schedule.per}:"
    )
    for name in schedule.estimators:
        estimator = run.schedule.estimators[name]
        batch = run.batch_size_of(name)
        cost = estimator.forwards_a_step * estimator.examples(batch) / batch
        cost += (3 if estimator.gradient_checkpointing else 2) if isinstance(estimator, Backprop) else 0
        steps = math.ceil(schedule.block / cost) if cost else None
        yield Text(
            f"  {name}: {steps} step{'s' * (steps != 1)} of {cost:g}" if steps else f"  {name}: no forward passes"
        )


def _longest(run: RunFile, estimator: str) -> int:
    own = run.objectives.get(estimator)
    return ((own and own.data) or run.data).max_tokens
