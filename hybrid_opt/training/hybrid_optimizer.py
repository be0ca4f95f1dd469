"""One step of hybrid optimisation: plan, estimate, apply. Next: `../scheduling/policy.py`, `../estimators/contract.py`,
`../engines/contract.py`, `updates.py`, `optimizer_state.py`.

One idea: this is the whole method. All estimates of a step are taken at the same weights and then applied together;
whether that amounts to alternating, blending or per-layer choice is decided by the plan and the policy alone.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_opt.config.by_length import ByLength
from hybrid_opt.config.engines import Engine as EngineConfig
from hybrid_opt.config.loading import load_schedule
from hybrid_opt.config.schedule import ScheduleFile, acting_names
from hybrid_opt.config.training import byte_size
from hybrid_opt.engines.build import build_engine, with_engine_settings
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.build import build_estimator
from hybrid_opt.estimators.comparison import compared_with
from hybrid_opt.estimators.contract import Cost, Estimate
from hybrid_opt.estimators.followers import Followers
from hybrid_opt.machine.energy import EnergyMeter
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import Closure, Objective, WeighsExamples, as_objective, to_device
from hybrid_opt.recovery.records import Record, digest_of
from hybrid_opt.scheduling.ownership import Ownership
from hybrid_opt.scheduling.policy import acting_in, may_ever_move
from hybrid_opt.scheduling.schedule import build_schedule
from hybrid_opt.scheduling.signals import Signals
from hybrid_opt.training import optimizer_state
from hybrid_opt.training.lengths import dealt
from hybrid_opt.training.memory_budget import MemoryBudget
from hybrid_opt.training.missing_gradients import MissingGradients
from hybrid_opt.training.profiling import Profiler
from hybrid_opt.training.refusals import (
    refuse_missing_gradient,
    refuse_not_finite,
    refuse_too_many_lost,
    refuse_unknown,
)
from hybrid_opt.training.step_report import StepReport, loss_of
from hybrid_opt.training.updates import Update, Updates, record_of
from hybrid_opt.training.weight_checks import WeightChecks


class HybridOptimizer:
    """Moves a model's weights by a schedule of estimators; `step` takes the place of `backward` and `optimizer.step`.

    Args:
        model: any `torch.nn.Module`; parameters with `requires_grad=False` are left alone.
        objective: `losses(model, batch) -> Tensor (examples,)`, or an Objective; not needed if only closures are used.
        schedule: a path, a shipped recipe's name, a dictionary, or a `ScheduleFile`.
        objectives: what some estimators minimise instead, by their names in the schedule.
        steps: length of the run, for learning rates that change over it.
        seed: decides all noise.
        engine: where the weights live, the `engine` section of a run file; None: where they are. With many processes (ZeRO) every
            one of them passes the same batches: backprop takes its share of the examples, ES its share of the members.
        check_drift_every: in how many steps each parameter is compared once with what it was after the update before; 0: none is,
            as for a loop that writes weights itself.
        memory_budget: bytes, or a size such as `20GB`, that backprop and the forward passes of ES are fitted into before the first step (see `MemoryBudget`);
            None: what there is.

    Backprop runs with the model in training mode (dropout on), ES in evaluation mode; both leave the mode as it was.

    Raises:
        UserError: the schedule is invalid, its policy does not fit the model, or the objective lacks the gradient that
            it asks for.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | Callable[[nn.Module, Any], Tensor] | None = None,
        *,
        schedule: str | Path | dict[str, Any] | ScheduleFile,
        objectives: Mapping[str, Objective | Callable[[nn.Module, Any], Tensor]] | None = None,
        steps: int | None = None,
        seed: int = 0,
        engine: EngineConfig | None = None,
        check_drift_every: int = 0,
        memory_budget: int | str | None = None,
    ) -> None:
        self.config = with_engine_settings(load_schedule(schedule), engine)
        self.objective = as_objective(objective)
        self.objectives = {name: as_objective(own) for name, own in (objectives or {}).items()}
        refuse_unknown(self.objectives, self.config, "objectives")
        self.seed = seed
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.ownership = Ownership(self.config, names)
        self.policies = self.ownership.widest
        """By phase; where rules are measured (`ownership`) they say who may ever move what."""
        refuse_missing_gradient(self.config, self.objective, self.objectives)
        self.engine = build_engine(model, self.config, self.ownership, engine, seed=seed)
        self.estimators = {name: build_estimator(c) for name, c in self.config.estimators.items()}
        for phase, policy in self.policies.items():
            for name in acting_in(self.config.schedule, phase):
                self.estimators[name].check(self.engine, policy.names(name))
        self.profiler = Profiler(self.engine, self.ownership, self.config.backprop, seed)
        self.memory = None
        if memory_budget is not None:
            self.memory = MemoryBudget(
                byte_size(memory_budget), self.config, self.engine, self.ownership, self.estimators
            )
        self.missing = MissingGradients(self.config, self.engine, self.policies)
        self.followers = self._followers()
        self.updates = Updates(self.config, self.engine, self.policies, steps)
        self.policy_digests = {phase: digest_of(policy.owners) for phase, policy in self.policies.items()}
        self.schedule = build_schedule(self.config.schedule)
        self.signals = Signals()
        self.energy = EnergyMeter(self.engine.device) if "joules" in self.config.signals else None
        self.rate_factor = 1.0
        """What all learning rates are multiplied by."""
        self.checks = WeightChecks(self.engine, check_drift_every)

    def step(self, batch: Any, batches: Mapping[str, Any] | None = None) -> StepReport:
        """Take one step.

        Args:
            batch: what the objective takes, the first dimension of its tensors being the examples; or a function
                without arguments that returns the losses (examples,) or their mean at the current weights, which is
                called once or more and must not call `backward`.
            batches: for some estimators another batch, by name.

        Raises:
            DivergedError: losses or weights that are not finite.
            DriftError: weights that have changed outside an update.
            UserError: losses that are not of the expected form.
        """
        with self.engine.ranks.loss_reported():
            return self._step(batch, batches or {})

    def _step(self, batch: Any, batches: Mapping[str, Any]) -> StepReport:
        started, joules, step = time.perf_counter(), self._joules(), self.signals.step
        refuse_unknown(batches, self.config, "batches")
        self.fit_memory(batch, batches)
        plan, batches = self._planned(batch, batches)
        seen = {name: batches.get(name, batch) for name in plan}
        first = next(iter(plan))
        profile = self.profiler.profile(self.schedule.phase, step, lambda: self._evaluated(first, seen[first]))
        estimates, costs, durations = self._estimates(seen)
        owned = {name: self.may_move(name) for name in plan}
        gradient = next((name for name in plan if self.updates.rules[name] is None), None)
        if gradient is not None:
            self.missing.look(estimates[gradient], owned[gradient], self.schedule.phase, gradient)
            self.followers.show(estimates[gradient], owned[gradient])
        compared = compared_with(gradient, estimates, owned, self.objectives, batches)
        estimates |= compared
        rates = {name: self.rate_factor * rate for name, rate in self.updates.rates(plan, step).items()}
        telling = [name for name in plan if not costs[name].is_empty]
        updates, factors = self.updates.coupled(Update(n, estimates[n], plan[n], rates[n], owned[n]) for n in telling)
        rates |= {update.estimator: update.learning_rate for update in updates}
        record = None
        if all(self.config.estimators[name].draws_noise for name in plan):
            record = record_of(step, self.policy_digests[self.schedule.phase], updates, self.seed)
        is_lost = not telling and refuse_too_many_lost(costs, step, self.signals.lost_steps)
        self.checks.before_update(step)
        if updates:
            self.updates.apply(record.parts if record else updates, step)
        self.checks.after_update(step, set().union(*(update.names for update in updates)))
        self.updates.turns.take(plan, telling)
        told = {name: estimate.statistics(self.engine.ranks) for name, estimate in compared.items()}
        told |= {name: {"trust_factor": factor} for name, factor in factors.items()}
        costs |= {n: replace(costs[n], statistics={**costs[n].statistics, **found}) for n, found in told.items()}
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)  # so that the time of a step is its own
        seconds = time.perf_counter() - started
        rest = (seconds - sum(durations.values()) - (profile.seconds if profile else 0.0)) / len(durations)
        report = StepReport(
            step=step,
            weights=plan,
            costs=costs,
            learning_rates=rates,
            loss=loss_of(cost for name, cost in costs.items() if name not in self.objectives),
            seconds=seconds,
            part_seconds={name: duration + rest for name, duration in durations.items()},
            record=record,
            decision=self.schedule.reason,
            account=self.schedule.account,
            profile=profile,
            memory=self.memory.take_told() if self.memory else "",
        )
        self._count(report, joules, is_lost)
        return report

    def _planned(self, batch: Any, batches: Mapping[str, Any]) -> tuple[dict[str, float], Mapping[str, Any]]:
        """Who acts with which weight, and the batches of those that do not see the step's."""
        plan = self.schedule.plan(self.signals.step, self.signals)
        if isinstance(by := self.config.schedule, ByLength) and not batches.keys() >= plan.keys():
            batches = dealt(by, batch)
            plan = {name: weight for name, weight in plan.items() if name in batches}
        return plan, batches

    def _count(self, report: StepReport, joules: float, is_lost: bool) -> None:
        """Let the signals know of a step; of all ranks the same, because all decide by them.

        Args:
            joules: what the device had taken before it.
        """
        ranks = self.engine.ranks
        self.signals = self.signals.updated(
            tokens=report.tokens,
            forwards=report.forwards,
            backwards=report.backwards,
            forward_equivalents=report.forward_equivalents,
            seconds=ranks.most(report.seconds)[0],
            joules=ranks.total(self._joules() - joules) if self.energy else 0.0,
            loss=report.loss,
            is_lost=is_lost,
            measured=report.measured,
        )

    def _estimates(self, seen: Mapping[str, Any]) -> tuple[dict[str, Estimate], dict[str, Cost], dict[str, float]]:
        """Everybody's estimate at the present weights, what it took, and for how many seconds.

        Args:
            seen: the batch of each estimator that acts.
        """
        estimates, costs, durations = {}, {}, {}
        for name, batch in seen.items():
            begun = time.perf_counter()
            estimates[name], costs[name] = self._estimate(name, *self._evaluated(name, batch))
            durations[name] = time.perf_counter() - begun
        return estimates, costs, durations

    def fit_memory(self, batch: Any, batches: Mapping[str, Any] | None = None) -> None:
        """Fit backprop into the memory budget, if there is one and this has not been done yet; `step` does so with its own batch.

        Args:
            batch, batches: as for `step`, the largest that are to be expected.

        Raises:
            UserError: an estimator takes more than the budget by itself.
        """
        if self.memory and not self.memory.is_chosen:
            self.memory.choose(lambda name: self._evaluated(name, (batches or {}).get(name, batch)))

    def _joules(self) -> float:
        """What the device has taken so far, if the schedule goes by that: reading it takes time, on ranks an exchange too."""
        return self.energy.read() if self.energy else 0.0

    def _estimate(self, name: str, objective: Objective, batch: Any) -> tuple[Estimate, Cost]:
        """One estimator's estimate, with the step and its name in front of what goes wrong. Where memory is short for a gradient, again with
        less to take it of, if there is a memory budget."""
        step = self.signals.step
        try:
            key = StepKey(self.seed, step, name)
            estimate, cost = self.estimators[name].estimate(self.engine, objective, batch, self.may_move(name), key)
            refuse_not_finite(cost)
            return estimate, cost
        except UserError as error:
            raise type(error)(f"step {step}, estimator {name}: {error}") from error
        except torch.OutOfMemoryError as error:
            if not (self.memory and self.memory.shrink(name, "out of memory")):
                raise UserError(
                    f"step {step}, estimator {name}: out of memory; lower members_per_forward (es), raise accumulation or turn on "
                    f"gradient_checkpointing (backprop), or lower batch_size: {str(error).splitlines()[0]}"
                ) from error
        return self._estimate(name, objective, batch)

    def _evaluated(self, name: str, batch: Any) -> tuple[Objective, Any]:
        """What an estimator minimises in a step, and on what."""
        objective = self.objectives.get(name, self.objective)
        if callable(batch):
            return Closure(batch), None
        if objective is None:
            raise UserError("objective: none was given, so pass step() a function that returns the losses")
        batch = to_device(batch, self.engine.device)
        return objective, objective.weighed(batch) if isinstance(objective, WeighsExamples) else batch

    @torch.no_grad()
    def replay(self, document: Mapping[str, Any]) -> None:
        """Take the next step again as a ledger tells of it, evaluating nothing; all ranks together.

        Moves the weights and the update rules' state, and no signal but the number of steps.

        Args:
            document: what `Record.document` gave.

        Raises:
            UserError: another policy than the run's.
        """
        if document.get("policy") not in self.policy_digests.values():
            raise UserError(
                f"step {document.get('step')} of the ledger was taken under another policy than this schedule's; use the run's own run.yaml"
            )
        record = Record.restored(document, self.estimators, self.engine, self.seed)
        self.checks.forget()
        for part in record.parts:
            self.updates.after_rest(part)
        if record.parts:
            self.updates.apply(record.parts, record.step)
        self.signals = replace(self.signals, step=record.step + 1)

    def acting(self) -> list[str]:
        """Names of the estimators that the next step will use."""
        return list(self.schedule.plan(self.signals.step, self.signals))

    def asks(self) -> bool:
        """Whether the schedule wants to be told the loss on probe rows (`tell({"probe_loss": ...})`) before the next step."""
        return self.schedule.asks(self.signals)

    def may_move(self, name: str) -> list[str]:
        """Parameters that an estimator may move in the phase of the latest plan, by the latest measurement."""
        return self.ownership.names(self.schedule.phase, name)

    def may_come_to_move(self, names: Iterable[str]) -> set[str]:
        """Parameters that estimators may move in the phase of the latest plan, whatever is measured before the step."""
        return {parameter for name in names for parameter in self.policies[self.schedule.phase].names(name)}

    def state_dict(self, folder: Path | None = None, *, weights: bool = True) -> dict[str, Any]:
        """Everything that the next step depends on: weights, optimizer, update rules, what estimators remember, turns, schedule and
        signals.

        Args:
            folder: a new folder, into which DeepSpeed writes what it saves itself; not needed without ZeRO.
            weights: False leaves out the first three, which `replay` brings about.
        """
        return optimizer_state.saved(self, folder, weights=weights)

    def load_state_dict(self, state: dict[str, Any], folder: Path | None = None) -> None:
        """Put back what `state_dict` gave and wrote, with as many ranks under the same stage, the same model, schedule and seed.

        Raises:
            UserError: it is of another schedule, seed or model; learning rates, clipping and `max_nonfinite` may have changed.
        """
        optimizer_state.put_back(self, state, folder)

    def roll_back(self, state: dict[str, Any], folder: Path | None = None) -> None:
        """Put back the weights, and what optimizer, update rules and estimators remember; the counts of steps and turns, the
        schedule and `rate_factor` stay as they are."""
        optimizer_state.roll_back(self, state, folder)

    def tell(self, measured: Mapping[str, float]) -> None:
        """Let the schedule's triggers know what was measured after the latest step, such as `{"validation_loss": 1.5}`; by the names of
        `config.triggers`, and the same on all ranks."""
        self.signals = self.signals.told(measured)

    def skip_step(self) -> None:
        """Go on with the next step where this one could not be taken."""
        self.updates.turns.take(self.acting(), ())
        self.signals = self.signals.updated(loss=None)

    def _followers(self) -> Followers:
        acting = {name: self.estimators[name] for name in acting_names(self.config.schedule)}
        may_move = {name: may_ever_move(self.config, self.policies, name) for name in acting}
        return Followers(self.engine, acting, may_move)
