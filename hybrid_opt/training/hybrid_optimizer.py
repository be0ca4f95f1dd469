"""One step of hybrid optimisation: plan, estimate, apply. Next: `../scheduling/policy.py`, `../estimators/contract.py`,
`../engines/contract.py`.

One idea: this is the whole method. All estimates of a step are taken at the same weights and then applied together;
whether that amounts to alternating, blending or per-layer choice is decided by the plan and the policy alone.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_opt.config.engines import Engine as EngineConfig
from hybrid_opt.config.estimators import Backprop, EvolutionStrategy, StaleGradient
from hybrid_opt.config.estimators import Estimator as EstimatorConfig
from hybrid_opt.config.loading import load_schedule
from hybrid_opt.config.schedule import ScheduleFile, acting_names
from hybrid_opt.engines.build import build_engine, with_engine_settings
from hybrid_opt.engines.contract import Contribution
from hybrid_opt.engines.update_rules import UpdateRule, build_rule
from hybrid_opt.errors import DivergedError, UserError
from hybrid_opt.estimators.backprop import BackpropEstimator
from hybrid_opt.estimators.comparison import Compared
from hybrid_opt.estimators.contract import Cost, Estimate, Estimator
from hybrid_opt.estimators.es import EsEstimator
from hybrid_opt.estimators.followers import Followers
from hybrid_opt.estimators.noise import Key
from hybrid_opt.estimators.stale_gradient import StaleGradientEstimator
from hybrid_opt.objectives.contract import FunctionObjective, Objective, to_device
from hybrid_opt.scheduling.learning_rate import INDEPENDENT_OF_LENGTH, learning_rate_at
from hybrid_opt.scheduling.policy import acting_in, may_ever_move, resolve_policies
from hybrid_opt.scheduling.schedule import build_schedule
from hybrid_opt.scheduling.signals import Signals


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
    evaluated."""
    tokens: int
    """Tokens that forward passes processed."""
    seconds: float
    """Duration."""
    part_seconds: dict[str, float]
    """Duration of each estimate, and of an even part of the rest."""


class HybridOptimizer:
    """Moves a model's weights by a schedule of estimators; `step` takes the place of `backward` and `optimizer.step`.

    Args:
        model: any `torch.nn.Module`; parameters with `requires_grad=False` are left alone.
        objective: `losses(model, batch) -> Tensor (examples,)`, or an Objective; not needed if only closures are used.
        schedule: a path, a shipped recipe's name, a dictionary, or a `ScheduleFile`.
        steps: length of the run, for learning rates that change over it.
        seed: decides all noise.
        engine: where the weights live, the `engine` section of a run file; None: where they are. With many processes (ZeRO) every
            one of them passes the same batches: backprop takes its share of the examples, ES its share of the members.

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
        steps: int | None = None,
        seed: int = 0,
        engine: EngineConfig | None = None,
    ):
        self.config = with_engine_settings(load_schedule(schedule), engine)
        self.objective = as_objective(objective)
        self.seed = seed
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.policies = resolve_policies(self.config, names)
        self._refuse_missing_gradient()
        self.engine = build_engine(model, self.config, self.policies.values(), engine, seed=seed)
        self.estimators = {name: _build_estimator(c) for name, c in self.config.estimators.items()}
        for phase, policy in self.policies.items():
            for name in acting_in(self.config.schedule, phase):
                self.estimators[name].check(self.engine, policy.names(name))
        self.followers = self._followers()
        self.rules: dict[str, UpdateRule | None] = {
            name: None if isinstance(c, Backprop) else build_rule(c.update)
            for name, c in self.config.estimators.items()
        }
        self.learning_rates = {name: _learning_rate(name, c, steps) for name, c in self.config.estimators.items()}
        self.schedule = build_schedule(self.config.schedule)
        self.signals = Signals()

    def step(self, batch: Any) -> StepReport:
        """Take one step.

        Args:
            batch: what the objective takes, the first dimension of its tensors being the examples; or a function
                without arguments that returns the losses (examples,) or their mean at the current weights, which is
                called once or more and must not call `backward`.

        Raises:
            UserError: losses that are not finite or not of the expected form.
        """
        with self.engine.ranks.loss_reported():
            return self._step(batch)

    def _step(self, batch: Any) -> StepReport:
        started, step = time.perf_counter(), self.signals.step
        objective = _Closure(batch) if callable(batch) else self.objective
        if objective is None:
            raise UserError("objective: none was given, so pass step() a function that returns the losses")
        batch = None if callable(batch) else to_device(batch, self.engine.device)
        plan = self.schedule.plan(step, self.signals)
        owned = {name: self.may_move(name) for name in plan}
        estimates, costs, durations = {}, {}, {}
        for name in plan:
            begun = time.perf_counter()
            estimates[name], costs[name] = self._estimate(name, objective, batch, owned[name])
            durations[name] = time.perf_counter() - begun
        gradient = next((name for name in plan if self.rules[name] is None), None)
        if gradient is not None:
            self.followers.show(estimates[gradient], owned[gradient])
        compared = self._compared(gradient, estimates, owned)
        estimates |= compared
        rates = {name: self.learning_rates[name](step) for name in plan}
        self.engine.apply(
            [Contribution(estimates[name], plan[name], owned[name], rates[name], self.rules[name]) for name in plan],
            step,
        )
        for name, estimate in compared.items():
            found = {**costs[name].statistics, **estimate.statistics(self.engine.ranks)}
            costs[name] = replace(costs[name], statistics=found)
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)  # so that the time of a step is its own
        seconds = time.perf_counter() - started
        rest = (seconds - sum(durations.values())) / len(durations)
        report = StepReport(
            step=step,
            weights=plan,
            costs=costs,
            learning_rates=rates,
            loss=_loss(costs.values()),
            tokens=sum(cost.tokens for cost in costs.values()),
            seconds=seconds,
            part_seconds={name: duration + rest for name, duration in durations.items()},
        )
        self.signals = self.signals.updated(
            tokens=report.tokens,
            forwards=sum(cost.forwards for cost in costs.values()),
            backwards=sum(cost.backwards for cost in costs.values()),
            forward_equivalents=sum(cost.forward_equivalents for cost in costs.values()),
            seconds=report.seconds,
            loss=report.loss,
        )
        return report

    def _estimate(self, name: str, objective: Objective, batch: Any, owned: list[str]) -> tuple[Estimate, Cost]:
        """One estimator's estimate, with the step and its name in front of what goes wrong."""
        step = self.signals.step
        try:
            key = Key((self.seed, step)).fold(name)
            estimate, cost = self.estimators[name].estimate(self.engine, objective, batch, owned, key)
            _refuse_not_finite(cost)
        except UserError as error:
            raise type(error)(f"step {step}, estimator {name}: {error}") from error
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"step {step}, estimator {name}: out of memory; lower members_per_forward (es), raise accumulation or turn on "
                f"gradient_checkpointing (backprop), or lower batch_size: {str(error).splitlines()[0]}"
            ) from error
        return estimate, cost

    def _compared(
        self, gradient: str | None, estimates: dict[str, Estimate], owned: dict[str, list[str]]
    ) -> dict[str, Compared]:
        """The other estimates of a step in which backprop acts, each compared with the gradient where both move the same."""
        if gradient is None:
            return {}
        return {
            name: Compared(estimate, estimates[gradient], frozenset(owned[gradient]))
            for name, estimate in estimates.items()
            if name != gradient and not set(owned[gradient]).isdisjoint(owned[name])
        }

    def acting(self) -> list[str]:
        """Names of the estimators that the next step will use."""
        return list(self.schedule.plan(self.signals.step, self.signals))

    def may_move(self, name: str) -> list[str]:
        """Parameters that an estimator may move in the phase of the latest plan."""
        return self.policies[self.schedule.phase].names(name)

    def state_dict(self, folder: Path | None = None) -> dict[str, Any]:
        """Everything that the next step depends on: weights, optimizer, update rules, what estimators remember, schedule and signals.

        Args:
            folder: a new folder, into which DeepSpeed writes what it saves itself; not needed without ZeRO.
        """
        return {
            "layout": self.engine.layout(),
            "engine": self.engine.state_dict(folder),
            "rules": {name: rule.state_dict() for name, rule in self.rules.items() if rule is not None},
            "estimators": self.followers.state_dict(),
            "schedule": self.schedule.state_dict(),
            "signals": asdict(self.signals),
        }

    def load_state_dict(self, state: dict[str, Any], folder: Path | None = None) -> None:
        """Put back what `state_dict` gave and wrote, with as many ranks under the same stage."""
        self.engine.load_state_dict(state["engine"], folder)
        for name, rule in self.rules.items():
            if rule is not None:
                rule.load_state_dict(state["rules"][name])
        self.followers.load_state_dict(state["estimators"])
        self.schedule.load_state_dict(state["schedule"])
        self.signals = Signals(**state["signals"])

    def _followers(self) -> Followers:
        acting = {name: self.estimators[name] for name in acting_names(self.config.schedule)}
        may_move = {name: may_ever_move(self.config, self.policies, name) for name in acting}
        return Followers(self.engine, acting, may_move)

    def _refuse_missing_gradient(self) -> None:
        for name in acting_names(self.config.schedule):
            if (
                isinstance(self.config.estimators[name], Backprop)
                and self.objective
                and not self.objective.differentiable
            ):
                raise UserError(
                    f"schedule: {name!r} is backprop, but the objective has no gradient; use a schedule of es alone"
                )


class _Closure:
    """A function without arguments as an objective."""

    differentiable = True

    def __init__(self, function: Callable[[], Tensor]):
        self.function = function

    def losses(self, model: nn.Module, batch: None) -> Tensor:
        losses = self.function()
        if not isinstance(losses, Tensor) or not losses.is_floating_point() or losses.dim() > 1:
            raise UserError(
                f"the function given to step() must return losses (examples,) or their mean, not {losses!r}"
            )
        return losses.reshape(-1)

    def measures(self, model: nn.Module, batch: None) -> dict[str, Tensor]:
        return {"loss": self.losses(model, batch)}


def as_objective(objective: Objective | Callable[[nn.Module, Any], Tensor] | None) -> Objective | None:
    """An Objective from a plain function; an Objective as it is."""
    if objective is None or hasattr(objective, "losses"):
        return objective
    if callable(objective):
        return FunctionObjective(objective)
    raise UserError(f"objective: expected losses(model, batch) -> Tensor (examples,), got {objective!r}")


def _build_estimator(config: EstimatorConfig) -> Estimator:
    match config:
        case EvolutionStrategy():
            return EsEstimator(config)
        case Backprop():
            return BackpropEstimator(config)
        case StaleGradient():
            return StaleGradientEstimator()


def _loss(costs: Iterable[Cost]) -> float | None:
    """The loss of the part that says most of the weights themselves, which is backprop's."""
    evaluated = [cost for cost in costs if cost.loss is not None]
    return max(evaluated, key=lambda cost: cost.backwards).loss if evaluated else None


def _refuse_not_finite(cost: Cost) -> None:
    if cost.loss is not None and not math.isfinite(cost.loss):
        raise DivergedError(
            f"the loss is {cost.loss}; lower the learning rates, or clip gradients with gradient_clipping"
        )


def _learning_rate(name: str, config, steps: int | None) -> Callable[[int], float]:
    if steps is None and config.learning_rate_schedule not in INDEPENDENT_OF_LENGTH:
        raise UserError(
            f"estimators.{name}.learning_rate_schedule: {config.learning_rate_schedule!r} depends on the number of steps of the run; "
            "say it: training.steps in a run file (with a budget: the most steps), steps=... in Python"
        )
    return learning_rate_at(config, steps or 0)
