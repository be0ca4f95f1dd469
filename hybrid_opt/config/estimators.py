"""The estimators that a schedule file may choose from by `type`. Next: `schedule.py`.

One idea: an estimator's options are one frozen object, and what they cannot mean together is refused, never changed.
"""

from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from hybrid_opt.config.align import Align
from hybrid_opt.config.forward_gradient import ForwardGradient
from hybrid_opt.config.fzoo import Fzoo
from hybrid_opt.config.guided import Guided
from hybrid_opt.config.probing import EvolutionStrategy, Spsa
from hybrid_opt.config.steps import DirectStep, LearningRate
from hybrid_opt.config.strict import NonNegativeFloat, PositiveFloat, PositiveInt

TorchOptimizerName = Literal[
    "ASGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]


STATE_VALUES = {"SGD": 0, "Adagrad": 1, "RMSprop": 1, "ASGD": 1}
"""Values that an optimizer of torch keeps for each weight, where that is not 2; a momentum is one more."""


FIRST_MOMENTS = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam")
"""Optimizers of torch that keep a running mean of gradients; others do with a momentum."""

DECAYING = ("Adam", "AdamW", "SGD")
"""Optimizers of torch whose state is nothing but sums that decay, and counts of steps."""


class Backprop(LearningRate):
    """Exact gradient of the mean loss by backpropagation, applied by a torch optimizer."""

    differentiates: ClassVar[bool] = True

    type: Literal["backprop"]
    optimizer: TorchOptimizerName = "AdamW"
    """A class of `torch.optim`."""
    optimizer_arguments: dict[str, Any] = {}
    """Further arguments of the optimizer, such as `{weight_decay: 0.1}`."""
    gradient_clipping: PositiveFloat | None = None
    """Largest norm of the whole gradient; null: no clipping."""
    accumulation: PositiveInt = 1
    """Parts into which a batch is split, one backward pass each; the gradient is that of the whole batch."""
    micro_batch_size: PositiveInt | None = None
    """Most examples in a backward pass (on each rank), instead of accumulation; null: as accumulation says."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them (Hugging Face models)."""
    autocast: Literal["bfloat16"] | None = None
    """Run the forward pass under `torch.autocast` in this dtype."""
    anchor: NonNegativeFloat = 0.0
    """Strength of a pull back to the weights at the start: adds `anchor / 2 |w - w_start|^2` to what is minimised (L2-SP, arXiv
    1802.01483), and keeps a copy of them in main memory."""
    missing_gradients: Literal["refuse", "ignore"] = "refuse"
    """What is done about parameters that no estimator without a gradient may move, and whose gradient was zero in two steps: an error, or
    nothing, as for experts that few batches come by."""

    @model_validator(mode="after")
    def _one_split(self) -> Self:
        if self.micro_batch_size is not None and self.accumulation > 1:
            raise ValueError("accumulation and micro_batch_size both say how a batch is split; keep one of them")
        return self

    def untreated(self) -> str:
        """See `LearningRate.untreated`: of which optimizers it is known what gradients of 0 would do to their state."""
        if not self.state_values and self.optimizer == "SGD":
            return "SGD keeps no state; write optimizer_arguments: {momentum: 0.9}, or drop state_on_switch"
        if self.state_on_switch == "decay" and self.optimizer not in DECAYING:
            return f"nothing is known of how {self.optimizer}'s state decays; write reset, or optimizer: AdamW, Adam or SGD"
        return ""

    @field_validator("optimizer_arguments")
    @classmethod
    def _learning_rate_has_one_place(cls, arguments: Any) -> Any:
        if "lr" in arguments:
            raise ValueError("'lr' belongs in learning_rate, not in optimizer_arguments")
        return arguments

    @property
    def forwards(self) -> int:
        """Forward passes a step, over the whole batch."""
        return 1

    def examples(self, batch_size: int) -> int:
        """Examples in a step."""
        return batch_size

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Bytes beyond those of inference, in float32; activations, which depend on the model, are not counted.

        Args:
            shapes: parameters that backprop may move.
        """
        values = 4 * sum(map(prod, shapes.values()))
        state = {f"{self.optimizer}'s state": self.state_values * values, **self.passing(shapes)}
        return {what: count for what, count in (state | {"anchor": values if self.anchor else 0}).items() if count}

    def passing(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """See `LearningRate.passing`: the gradient."""
        return {"gradient": 4 * sum(map(prod, shapes.values()))}

    @property
    def state_values(self) -> int:
        """Values that the optimizer keeps for each weight."""
        return STATE_VALUES.get(self.optimizer, 2) + bool(self.optimizer_arguments.get("momentum"))

    @property
    def has_first_moment(self) -> bool:
        """Whether the optimizer keeps a running mean or sum of gradients."""
        return self.optimizer in FIRST_MOMENTS or bool(self.optimizer_arguments.get("momentum"))


class StaleGradient(DirectStep):
    """The latest gradient that backprop took, once more, without any forward pass: what ES steps must be better than."""

    type: Literal["stale_gradient"]

    @property
    def needs_gradient(self) -> bool:
        """It is one."""
        return True

    def examples(self, batch_size: int) -> int:
        """None."""
        return 0

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """See `DirectStep.keeps`; and the gradient in float32."""
        return super().keeps(shapes) | {"gradient": 4 * sum(map(prod, shapes.values()))}


Estimator = Annotated[
    EvolutionStrategy | Spsa | Align | Fzoo | Guided | ForwardGradient | Backprop | StaleGradient,
    Field(discriminator="type"),
]
