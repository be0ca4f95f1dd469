"""The peak memory of a run's phases by kind, per rank, before weights are loaded. Next: `step_memory.py`, `traffic.py`, `tables.py`.

One idea: what is there all the time follows from shapes, dtypes and the engine; what is there only while somebody acts is counted in a
pretended step; the peak is the first plus the largest of the second.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from hybrid_opt.config.engines import ZeroEngine
from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.probing import Probing
from hybrid_opt.config.run import RunFile
from hybrid_opt.config.schedule import Blend, acting_names
from hybrid_opt.objectives.contract import Objective, count_elements, count_examples
from hybrid_opt.perturbations.forward_size import EFFICIENT
from hybrid_opt.planning.step_memory import PretendedModel
from hybrid_opt.scheduling.policy import acting_in, may_ever_move, resolve_policies

FLOAT32 = 4
BUCKET = 500_000_000
"""Values in DeepSpeed's buffer for reducing gradients, unless its file says otherwise."""
MAX_LIVE = 1_000_000_000
"""Values that ZeRO-3 keeps gathered at most, unless DeepSpeed's file says otherwise."""
UPDATE_COPIES = 2
"""Tensors of the size of the largest parameter that an update makes on its way, one parameter after another."""


@dataclass(frozen=True)
class Acting:
    """What one estimator takes while it acts, in bytes."""

    held: dict[str, int]
    """From its estimate to the update: gradients."""
    passing: dict[str, int]
    """At most one of these groups at once: what passes through the model take, and what the update takes."""

    @property
    def peak(self) -> int:
        """Both."""
        return sum(self.held.values()) + max(self.passing.values(), default=0)


@dataclass(frozen=True)
class Prediction:
    """Bytes per rank in one phase."""

    phase: int | None
    lasting: dict[str, int]
    """What is there all the time, by kind."""
    acting: dict[str, Acting] = field(default_factory=dict)
    """By estimator."""
    together: bool = False
    """Whether they act in the same steps."""

    @property
    def peak(self) -> int:
        """The most at once."""
        if not self.together:
            return sum(self.lasting.values()) + max((a.peak for a in self.acting.values()), default=0)
        held = sum(sum(a.held.values()) for a in self.acting.values())
        return sum(self.lasting.values()) + held + max(max(a.passing.values(), default=0) for a in self.acting.values())


@dataclass(frozen=True)
class Batch:
    """What an estimator minimises, and the largest batch that it may see."""

    objective: Objective
    values: Any


class Predictor:
    """Predicts a run's memory.

    Args:
        run: the run; its weights are not read.
        model: it, pretended, in the dtype of the run.
        batches: for each estimator that acts and evaluates.
        world_size: processes.
        device: `cpu` or `cuda`, whose kinds of memory differ.
    """

    def __init__(
        self,
        run: RunFile,
        model: PretendedModel,
        batches: Mapping[str, Batch],
        *,
        world_size: int = 1,
        device: str = "cpu",
    ) -> None:
        self.run, self.model, self.batches, self.device = run, model, batches, device
        self.ranks = world_size
        self.stage = run.engine.zero_stage if isinstance(run.engine, ZeroEngine) else 0
        parameters = dict(model.module.named_parameters())
        self.shapes = {name: tuple(parameters[name].shape) for name in model.movable}
        self.width = next(iter(parameters.values())).element_size()
        self.policies = resolve_policies(run.schedule, model.movable)
        self.names = acting_names(run.schedule.schedule)
        self.owned = {name: may_ever_move(run.schedule, self.policies, name) for name in self.names}
        self.backprop = run.schedule.acting_backprop

    def phases(self) -> list[Prediction]:
        """One a phase; one for a run without."""
        return [self._phase(phase) for phase in self.policies]

    def _phase(self, phase: int | None) -> Prediction:
        acting = {
            name: self._acting(name, self.policies[phase].names(name))
            for name in acting_in(self.run.schedule.schedule, phase)
            if name in self.batches
        }
        schedule = self.run.schedule.schedule if phase is None else self.run.schedule.schedule.phases[phase].schedule
        together = isinstance(schedule, Blend) or schedule.type == "by_length"
        return Prediction(phase, self._lasting(), acting, together)

    # ------------------------------------------------------------ all the time

    def _lasting(self) -> dict[str, int]:
        shares = {name: self._kept_by(name) for name in self.names}
        found = {
            "weights": self.model.weight_bytes // (self.ranks if self.stage == 3 else 1),
            "gathered weights": min(self.model.weight_bytes, MAX_LIVE * self.width) if self.stage == 3 else 0,
            "masters": self._masters(),
        }
        for kinds in shares.values():
            for kind, count in kinds.items():
                found[kind] = found.get(kind, 0) + count
        return {kind: count for kind, count in found.items() if count}

    def _masters(self) -> int:
        """Float32 copies of weights: DeepSpeed's of all that backprop may own, in parts; ours of narrower ones that anybody moves."""
        movable = set().union(*self.owned.values())
        owned = self.owned.get(self.backprop, frozenset()) if self.stage else frozenset()
        narrow = self.width < FLOAT32 and self.run.engine.master_weights == "fp32"
        direct = FLOAT32 * self.values_of(movable - owned) * narrow
        return FLOAT32 * self.values_of(owned) // self.ranks + direct // (self.ranks if self.stage == 3 else 1)

    def _kept_by(self, name: str) -> dict[str, int]:
        """What an estimator keeps between steps; under ZeRO its parts are spread where its weights are."""
        config = self.run.schedule.estimators[name]
        shapes = {parameter: self.shapes[parameter] for parameter in self.owned[name]}
        lasting = config.lasting(shapes)
        if isinstance(config, Backprop):
            return {kind: count // (self.ranks if self.stage else 1) for kind, count in lasting.items()}
        return {f"{name}: {kind}": count // (self.ranks if self.stage == 3 else 1) for kind, count in lasting.items()}

    # ------------------------------------------------------------ while somebody acts

    def _acting(self, name: str, owned: Collection[str]) -> Acting:
        config, batch = self.run.schedule.estimators[name], self.batches[name]
        if isinstance(config, Backprop):
            return self._backprop(config, batch, owned)
        shapes = {parameter: self.shapes[parameter] for parameter in owned}
        held, passes = {}, 1
        if isinstance(config, Probing):
            held = {"noise": sum(config.passing(shapes).values())}
            passes = self._rows(config, batch)
        examples = count_examples(batch.values)
        return Acting(
            held,
            {
                "activations": self.model.forward_bytes(batch.objective, batch.values, passes, examples),
                # SGD adds noise to the weights as it is drawn; other rules need the whole of a parameter's estimate first.
                "update": 0 if config.update.type == "sgd" else UPDATE_COPIES * FLOAT32 * self._largest(owned),
            },
        )

    def _backprop(self, config: Backprop, batch: Batch, owned: Collection[str]) -> Acting:
        examples = math.ceil(count_examples(batch.values) / self.ranks)
        part = config.micro_batch_size or math.ceil(examples / config.accumulation)
        gradients, activations = self.model.backprop_bytes(
            config, batch.objective, batch.values, min(part, examples), owned
        )
        values = self.values_of(owned)
        if self.stage:
            buckets = min(BUCKET, values) * self.width
            gradients = gradients // (self.ranks if self.stage >= 2 else 1) + buckets
        elif self.width < FLOAT32:
            gradients += FLOAT32 * values  # the masters' own
        # On CUDA torch's optimizers step all parameters at once, elsewhere one after another.
        at_once = FLOAT32 * values // (self.ranks if self.stage else 1)
        update = at_once if self.device == "cuda" else UPDATE_COPIES * FLOAT32 * self._largest(owned)
        return Acting({"gradients": gradients}, {"activations": activations, "update": update})

    def _rows(self, config: Probing, batch: Batch) -> int:
        """Rows of a forward pass, as `ForwardSize` cuts them where memory allows."""
        examples = config.examples(count_examples(batch.values))
        in_a_pass = min(examples, config.micro_batch_size or examples)
        if config.perturbation.type == "dense":
            return in_a_pass
        efficient = math.ceil(EFFICIENT[self.device] / max(1, count_elements(batch.values)))
        members = config.members_per_forward
        members = max(1, efficient // in_a_pass) if members == "auto" else members
        most = max(1, config.forwards // self.ranks)
        return min(in_a_pass, efficient if config.members_per_forward == "auto" else in_a_pass) * min(members, most)

    def values_of(self, names: Collection[str]) -> int:
        """How many values parameters have."""
        return sum(math.prod(self.shapes[name]) for name in names)

    def _largest(self, names: Collection[str]) -> int:
        return max((math.prod(self.shapes[name]) for name in names), default=0)
