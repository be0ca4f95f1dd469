"""How long a run trains, within what, and what happens along it. Next: `run.py`."""

from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError, model_validator
from typing_extensions import Self

from hybrid_opt.config.divergence import Divergence
from hybrid_opt.config.keeping import Keeping
from hybrid_opt.config.strict import NonNegativeInt, PositiveFloat, PositiveInt, Strict
from hybrid_opt.errors import UserError


class Budget(Strict):
    """What a run may spend in its steps (evaluations, probes and checkpoints are free); it ends with the first step that reaches it."""

    seconds: PositiveFloat | None = None
    """Time."""
    tokens: PositiveInt | None = None
    """Tokens that forward passes process, padding left out."""
    forward_equivalents: PositiveFloat | None = None
    """Computing, in forward passes over the whole batch: an ES member counts for the share of the batch that it sees, a
    backward pass for 2, with gradient checkpointing for 3."""

    @model_validator(mode="after")
    def _one_currency(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("a budget is exactly one of seconds, tokens and forward_equivalents")
        return self

    def spent(self, amounts: Any) -> float:
        """The share of the budget that is spent, given totals by attributes of these names (such as Signals)."""
        ((name, limit),) = self.model_dump(exclude_none=True).items()
        return getattr(amounts, name) / limit


class Training(Keeping):
    """Length of the run and what happens along it."""

    steps: PositiveInt | None = None
    """Steps to take; with a budget, the most."""
    budget: Budget | None = None
    """What the run may spend, instead of a number of steps."""
    batch_size: PositiveInt = 8
    """Examples in a step's batch; every estimator that acts sees the same ones."""
    seed: NonNegativeInt = 0
    """Decides the order of the data, all noise, and random weights."""
    evaluate_every: NonNegativeInt = 0
    """Steps between evaluations on the validation rows; 0: only before and after."""
    evaluation_rows: PositiveInt | None = None
    """Validation rows to use for evaluations along the way (before and after use all of them)."""
    evaluation_batch_size: PositiveInt = 16
    """Examples in a forward pass of an evaluation."""
    probe_rows: NonNegativeInt = 32
    """Rows on which the loss is measured whenever other estimators take over, to tell what each one contributed; 0: do
    not measure."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: only when interrupted."""
    save_model: bool = True
    """Leave the final model in the run folder."""
    divergence: Divergence | None = None
    """What is done about a loss that grows; null: only one that is not finite ends the run."""
    check_drift_every: NonNegativeInt = 50
    """Steps in which every weight is compared once with what it was after the update before, so that nobody else writes weights
    unnoticed; each step looks at another part of them. 0: none is."""

    memory_budget: ByteSize | None = None
    """Such as `20GB`: before the first step it is measured with how many of the last layers backprop stays below that, in how small parts
    of the batch, and with gradient checkpointing or without; of the rest it keeps off, which so is other estimators' alone. On CUDA it is
    what torch allocates, elsewhere the whole process. Left out: what the policy and the estimators say."""

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if self.steps is None and self.budget is None:
            raise ValueError("say how long to train: steps, or a budget such as {seconds: 600}")
        return self

    @model_validator(mode="after")
    def _knows_the_best(self) -> Self:
        if self.divergence and self.divergence.needs_evaluations and not self.evaluate_every:
            raise ValueError(
                "divergence: rises_for and roll_back go by evaluations along the way; write evaluate_every, or loss_above alone"
            )
        return self


def byte_size(size: int | str) -> int:
    """Bytes, from their number or from words such as `20GB`.

    Raises:
        UserError: they are no size.
    """
    try:
        return int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        raise UserError(f"memory_budget: {size!r} is no size; write bytes, or such as 20GB") from None
