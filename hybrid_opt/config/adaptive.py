"""The schedule that measures which estimator pays and lets it act. Next: `schedule.py`.

One idea: blocks of equal cost, each of one estimator, judged by what the loss on the probe rows has fallen for it.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from hybrid_opt.config.strict import NonNegativeFloat, Number, PositiveFloat, Strict

Discount = Annotated[float, Number, Field(gt=0, le=1)]


class Adaptive(Strict):
    """A bandit: each block of steps is given to the estimator with the highest `rate + exploration * width`.

    An estimator's rate is its discounted mean fall of the probe loss per second (or what `per` says) over its blocks:
    `sum_b discount^(B-b) r_b / n`, `n = sum_b discount^(B-b)` over the blocks b of B that were its own, and
    `width = s sqrt(ln(max(e, N)) / n)`, N the sum of all n and s the largest absolute rate, which is discounted UCB (Garivier and
    Moulines 2008, arXiv 0805.3415) in units of the rates. Each estimator has one block first, in the order written.
    Nothing is drawn at random: the same signals give the same decisions.
    """

    type: Literal["adaptive"]
    estimators: Annotated[tuple[str, ...], Field(min_length=2)]
    """Names of the estimators to choose from."""
    block: PositiveFloat = 48.0
    """Cost of a block, in forward passes over a batch; the step that reaches it is its last."""
    per: Literal["second", "forward_equivalent", "joule"] = "second"
    """What a fall of the loss is divided by; joules where the device reports its energy."""
    exploration: NonNegativeFloat = 0.3
    """How much an estimator that has not acted for long gains; 0: never more than its rate."""
    discount: Discount = 0.9
    """How much less a block says with each block after it; 1: as much for ever."""
    roll_back_above: PositiveFloat | None = None
    """A block that raises the probe loss by more than this is undone: weights and what estimators remember go back to its start, from a
    checkpoint that is made there. Left out: none is."""

    @field_validator("estimators")
    @classmethod
    def _are_different(cls, names: Any) -> Any:
        if len(set(names)) < len(names):
            raise ValueError(f"{list(names)} names an estimator twice; write each once")
        return names
