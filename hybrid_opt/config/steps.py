"""How far and by which rule an estimator steps; what all estimators share. Next: `probing.py`.

One idea: an estimator gives a direction, so its step length, its update rule and what wraps it are the same few options whatever the
direction came from.
"""

from collections.abc import Mapping
from math import prod
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from hybrid_opt.config.strict import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat, Strict
from hybrid_opt.config.wrappers import Wrapper

LearningRateScheduleName = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "inverse_sqrt",
]


StateOnSwitch = Literal["keep", "decay", "reset"]


class LearningRate(Strict):
    """The step length of one estimator, and what becomes of it and of its memory when the estimator acts again after a rest."""

    differentiates: ClassVar[bool] = False
    """Whether the estimator needs an objective that has a gradient."""

    draws_noise: ClassVar[bool] = False
    """Whether estimates are sums of noise that is drawn from keys, so that a ledger tells how to make them again."""

    learning_rate: PositiveFloat
    """Peak learning rate."""
    learning_rate_schedule: LearningRateScheduleName = "constant"
    """Course of the learning rate over the steps of the whole run, by transformers' name for it."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises from 0 (not for `constant`)."""
    warmup_after_switch: NonNegativeInt = 0
    """Steps n over which the learning rate rises whenever the estimator acts after a step in which it did not: in the k-th step of such a
    turn, from 0, it is `min(1, (k + 1) / n)` times what its schedule says. A turn that begins with the run's first step is none."""
    state_on_switch: StateOnSwitch = "keep"
    """What becomes of the update rule's memory (backprop: of the optimizer's) when the estimator acts after steps in which it did not:
    `keep` leaves it; `decay` makes it what it would be had the gradients of those steps been 0; `reset` forgets it."""

    @model_validator(mode="after")
    def _constant_has_no_warmup(self) -> Self:
        if self.learning_rate_schedule == "constant" and self.warmup_steps:
            raise ValueError(
                "learning_rate_schedule 'constant' has no warm-up; write 'constant_with_warmup' or drop warmup_steps"
            )
        return self

    @model_validator(mode="after")
    def _there_is_state_to_treat(self) -> Self:
        if self.state_on_switch != "keep" and (reason := self.untreated()):
            raise ValueError(f"state_on_switch: {self.state_on_switch}: {reason}")
        return self

    def untreated(self) -> str:
        """Why `state_on_switch` cannot be what it is, and what to write instead; empty if it can."""
        return ""

    def passing(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """What of `keeps` is there only from an estimate to its update."""
        return {}

    def lasting(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """What of `keeps` is there between steps."""
        passing = self.passing(shapes)
        return {what: count for what, count in self.keeps(shapes).items() if what not in passing}

    @property
    def needs_gradient(self) -> bool:
        """Whether it needs what backprop leaves behind."""
        return False

    @property
    def forwards_a_step(self) -> int:
        """Forward passes a step, those included that wrappers ask for."""
        return self.forwards


class SgdRule(Strict):
    """`w <- w - learning_rate * g`."""

    type: Literal["sgd"]


class MomentumRule(Strict):
    """`m <- beta m + g; w <- w - learning_rate * m` (torch's SGD with momentum)."""

    type: Literal["momentum"]
    beta: Decay = 0.9
    """Decay of the running sum m."""


class AdamRule(Strict):
    """Adam with bias correction (Kingma & Ba, arXiv 1412.6980)."""

    type: Literal["adam"]
    beta1: Decay = 0.9
    """Decay of the first moment."""
    beta2: Decay = 0.999
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


UpdateRule = Annotated[SgdRule | MomentumRule | AdamRule, Field(discriminator="type")]
STATE_VALUES = {"sgd": 0, "momentum": 1, "adam": 2}
"""Float32 values that an update rule keeps for each weight."""


class DirectStep(LearningRate):
    """What estimators have in common whose estimates are applied by an update rule of their own, not by torch's optimizer."""

    update: UpdateRule = SgdRule(type="sgd")
    """Rule that turns this estimator's estimate into a change of the weights, its state held in float32."""
    anchor: NonNegativeFloat = 0.0
    """Strength of a pull back to the weights at the start: adds `anchor / 2 |w - w_start|^2` to what is minimised (L2-SP, arXiv
    1802.01483), and keeps a copy of them in main memory."""
    wrappers: tuple[Wrapper, ...] = ()
    """What is done to the estimate on its way, the first innermost."""
    trust: PositiveFloat | None = None
    """Longest update: at most so many times as long as backprop's latest was, as Euclidean norms over all weights that each may move.
    The step's learning rate is lowered to that; before backprop has moved anything it is not. Draws the noise of each update once more
    to measure it, and a backprop step keeps a copy of its weights in main memory."""

    def untreated(self) -> str:
        """See `LearningRate.untreated`: SGD remembers nothing."""
        if self.update.type == "sgd":
            return "update: sgd keeps no state; write update: {type: momentum} or adam, or drop state_on_switch"
        return ""

    @model_validator(mode="after")
    def _replayed_estimates_come_from_keys(self) -> Self:
        replaying = next((wrapper.type for wrapper in self.wrappers if wrapper.replays), None)
        instead = (
            "write update: {type: momentum}, which keeps a buffer"
            if replaying == "momentum"
            else f"take {replaying} off"
        )
        for part in (self, *self.wrappers) if replaying else ():
            if not part.directions_from_keys:
                raise ValueError(
                    f"wrappers: {replaying} draws the directions of earlier steps again from their keys, but those of "
                    f"{part.type} depend on more (weights, gradients, or what otherwise: dense or frozen finds); {instead}"
                )
        return self

    @model_validator(mode="after")
    def _replaying_wrappers_find_what_they_replay(self) -> Self:
        kinds = [wrapper.type for wrapper in self.wrappers]
        replaying = [wrapper.type for wrapper in self.wrappers if wrapper.replays]
        if len(replaying) > 1:
            raise ValueError(
                f"wrappers: {' and '.join(replaying)} both draw the directions of earlier steps again, and neither can do so with those of "
                "the other; keep one of them, and for momentum beside it write update: {type: momentum}"
            )
        if "control_variate" in kinds and "layer_subset" in kinds[kinds.index("control_variate") :]:
            raise ValueError(
                "wrappers: layer_subset stands after control_variate, which would so be told of other layers in each step and compare "
                "estimates of different ones; write layer_subset before control_variate"
            )
        return self

    @property
    def directions_from_keys(self) -> bool:
        """Whether estimates are sums of directions that are functions of keys alone, so that they can be made again later."""
        return False

    @model_validator(mode="after")
    def _wrappers_find_noise(self) -> Self:
        shaping = [wrapper for wrapper in self.wrappers if wrapper.shapes_noise]
        for wrapper in shaping:
            if reason := self.unsuited(wrapper):
                raise ValueError(f"wrappers: {wrapper.type} does not suit {self.type}: {reason}")
        names = [wrapper.type for wrapper in shaping]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"wrappers: {double} is there twice; keep one of them")
        return self

    def unsuited(self, wrapper: Wrapper) -> str:
        """Why a wrapper cannot change the noise of this estimator, and what to write instead; empty if it can."""
        return f"it draws no noise; take {wrapper.type} off, or use spsa or es"

    @property
    def needs_gradient(self) -> bool:
        """See `LearningRate.needs_gradient`; or a wrapper does."""
        return any(wrapper.needs_gradient for wrapper in self.wrappers)

    @property
    def forwards(self) -> int:
        """Forward passes of one evaluation, over the examples that each sees."""
        return 0

    @property
    def forwards_a_step(self) -> int:
        """See `LearningRate.forwards_a_step`."""
        return self.forwards * prod(wrapper.passes for wrapper in self.wrappers)

    @property
    def example_groups(self) -> int:
        """Disjoint parts of a batch that a step sees, one after another."""
        return 1

    def examples(self, batch_size: int) -> int:
        """Examples in a forward pass."""
        return batch_size

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Bytes beyond those of inference, by what they are for.

        Args:
            shapes: parameters that the estimator may move.
        """
        values = sum(map(prod, shapes.values()))
        kept = {
            f"{self.update.type}'s state": 4 * STATE_VALUES[self.update.type] * values,
            "anchor": 4 * values if self.anchor else 0,
        }
        for wrapper in self.wrappers:
            kept[wrapper.type] = wrapper.keeps(shapes)
        return {what: count for what, count in kept.items() if count}
