"""Built-in baseline arms: what a hybrid schedule has to beat, made from the run under test. Next: `arms.py`.

One idea: a baseline is a function from the run under test to changes of it, so it sees the same data, batches and model, and takes over
the estimators' settings where it can.
"""

from collections.abc import Callable
from typing import Any

from hybrid_opt.config import load_schedule
from hybrid_opt.config.adaptive import Adaptive
from hybrid_opt.config.by_length import ByLength
from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.probing import Probing
from hybrid_opt.config.run import Lora, RunFile
from hybrid_opt.config.schedule import Alternate, Blend, Phases, Ramp, ScheduleFile, acting_names
from hybrid_opt.config.study import BaselineName, Changes
from hybrid_opt.errors import UserError

LORA_FACTOR = 10
"""The best learning rate for adapters is about ten times that for all weights (Schulman et al., LoRA Without Regret, 2025)."""
MEZO = {
    "type": "spsa",
    "pairs": 1,
    "sigma": 1e-3,
    "perturbation": {"type": "dense", "distribution": "gaussian"},
    "learning_rate": 1e-6,
}
"""One antithetic pair, SGD, with the paper's epsilon and the upper end of its learning rates (Malladi et al., arXiv 2305.17333)."""


def baseline(name: BaselineName, run: RunFile) -> Changes:
    """The changes that make the run under test into a baseline.

    Raises:
        UserError: the run's schedule has nothing that this baseline would change.
    """
    changes = BASELINES[name](run)
    used = load_schedule(changes["schedule"]).estimators
    own = {n: o.model_dump(mode="json", exclude_unset=True) for n, o in run.objectives.items() if n in used}
    return changes if len(own) == len(run.objectives) else {**changes, "objectives": own}


def backprop_checkpointing(run: RunFile) -> Changes:
    """Backprop alone at every step, recomputing activations: the memory that people pay who can take gradients."""
    return {"schedule": _single(_name(run, Backprop, "backprop"), _checkpointed(run))}


def lora(run: RunFile) -> Changes:
    """Backprop on low rank adapters of all linear layers, recomputing activations."""
    estimator = _checkpointed(run)
    estimator["learning_rate"] *= 1 if run.peft else LORA_FACTOR
    adapters = (run.peft or Lora()).model_dump(mode="json")
    return {"peft": adapters, "schedule": _single(_name(run, Backprop, "backprop"), estimator)}


def mezo(run: RunFile) -> Changes:
    """MeZO (arXiv 2305.17333): SPSA with one pair of forward passes a step, dense Gaussian noise, SGD."""
    return {"schedule": _single(_name(run, Probing, "mezo"), MEZO)}


def ea4llm(run: RunFile) -> Changes:
    """EA4LLM (arXiv 2510.10603) as published: the recipe `ea4llm`."""
    return {"schedule": "ea4llm"}


def scheduler_off(run: RunFile) -> Changes:
    """The same estimators without a schedule: all act in every step, weighted by their share of the steps (or of the ramps' weights)."""
    shares = _shares(run.schedule.schedule)
    if len(shares) < 2:
        raise UserError("baselines: scheduler_off needs a schedule of several estimators; drop it from baselines")
    changes = _with_schedule(run, {"type": "blend", "weights": shares})
    for estimator in changes["schedule"]["estimators"].values():
        estimator.pop("trust", None)  # updates that go through the optimizer together have no lengths of their own
    return changes


def order_swapped(run: RunFile) -> Changes:
    """The schedule backwards: turns and phases in the opposite order, ramps from their end to their start."""
    return _with_schedule(run, _swapped(run.schedule.schedule))


def stale_gradient(run: RunFile) -> Changes:
    """Where ES would act, the latest gradient once more, by Adam with backprop's learning rate, without a forward pass."""
    document = _document(run.schedule)
    acting = [run.schedule.estimators[name] for name in acting_names(run.schedule.schedule)]
    gradient = run.schedule.estimators.get(run.schedule.acting_backprop)
    if gradient is None or not any(isinstance(e, Probing) for e in acting):
        raise UserError("baselines: stale_gradient needs a schedule of es and backprop; drop it from baselines")
    for name, estimator in run.schedule.estimators.items():
        if isinstance(estimator, Probing):
            rate = {"learning_rate": gradient.learning_rate}
            document["estimators"][name] = {"type": "stale_gradient", "update": {"type": "adam"}, **rate}
    return {"schedule": document}


BASELINES: dict[BaselineName, Callable[[RunFile], Changes]] = {
    function.__name__: function
    for function in (backprop_checkpointing, lora, mezo, ea4llm, scheduler_off, order_swapped, stale_gradient)
}


# ---------------------------------------------------------------- pieces


def _single(name: str, estimator: dict[str, Any]) -> dict[str, Any]:
    return {"estimators": {name: estimator}, "schedule": {"type": "single", "estimator": name}}


def _name(run: RunFile, kind: type, otherwise: str) -> str:
    """What the run calls its estimator of this kind, so that an objective of its own stays its own."""
    return next((name for name, e in run.schedule.estimators.items() if isinstance(e, kind)), otherwise)


def _checkpointed(run: RunFile) -> dict[str, Any]:
    """The run's own backprop estimator, or the recipe's, with gradient checkpointing."""
    estimator = run.schedule.backprop or load_schedule("backprop_only").estimators["backprop"]
    return {**estimator.model_dump(mode="json", exclude_none=True), "gradient_checkpointing": True}


def _document(schedule: ScheduleFile) -> dict[str, Any]:
    return schedule.model_dump(mode="json", exclude_none=True)


def _with_schedule(run: RunFile, schedule: dict[str, Any]) -> Changes:
    return {"schedule": {**_document(run.schedule), "schedule": schedule}}


def _shares(schedule: Any) -> dict[str, float]:
    """Each estimator's share of the whole: of the turns, of the weights (ramps by their middle), or of the phases' by their steps."""
    match schedule:
        case Alternate():
            amounts = dict(schedule.pattern)
        case Blend():
            amounts = {n: (w.start + w.end) / 2 if isinstance(w, Ramp) else w for n, w in schedule.weights.items()}
        case Phases():
            amounts = {}
            for phase in schedule.phases:
                if phase.steps is None:
                    raise UserError(
                        "baselines: scheduler_off needs the length of every phase in steps, to weight the estimators; write "
                        "steps: ... in each phase, or drop it from baselines"
                    )
                for name, share in _shares(phase.schedule).items():
                    amounts[name] = amounts.get(name, 0.0) + share * phase.steps
        case ByLength():
            amounts = dict(schedule.weights)
        case Adaptive():
            raise UserError(
                "baselines: scheduler_off needs shares that are known before the run, and adaptive finds them in it; drop it from baselines"
            )
        case _:
            amounts = {schedule.estimator: 1.0}
    total = sum(amounts.values())
    return {name: amount / total for name, amount in amounts.items() if amount}


def _swapped(schedule: Any) -> dict[str, Any]:
    document = schedule.model_dump(mode="json", exclude_none=True)
    match schedule:
        case Alternate() if len(schedule.pattern) > 1:
            return {**document, "pattern": dict(reversed(document["pattern"].items()))}
        case Blend() if any(isinstance(w, Ramp) for w in schedule.weights.values()):
            ramps = {n: w for n, w in document["weights"].items() if isinstance(w, dict)}
            turned = {n: {**w, "start": w["end"], "end": w["start"]} for n, w in ramps.items()}
            return {**document, "weights": {**document["weights"], **turned}}
        case Adaptive():
            return {**document, "estimators": document["estimators"][::-1]}
        case Phases() if len(schedule.phases) > 1:
            if any(phase.steps is None and phase.tokens is None for phase in schedule.phases):
                raise UserError(
                    "baselines: order_swapped needs the length of the last phase too, because it comes first then; write "
                    "steps: ... there, or drop it from baselines"
                )
            if any(phase.then is not None for phase in schedule.phases):
                raise UserError(
                    "baselines: order_swapped cannot turn round phases that say what follows (then); drop it from baselines"
                )
            return {**document, "phases": document["phases"][::-1]}
    raise UserError("baselines: order_swapped needs turns, ramps or phases to swap; drop it from baselines")
