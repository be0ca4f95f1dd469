"""What ends a phase: a signal of the run that crosses a limit. Next: `schedule.py`.

One idea: whatever a step or an evaluation measures has a name, and a trigger asks for a name, a limit, and how often in a row.
"""

from pydantic import Field, model_validator
from typing_extensions import Self

from hybrid_opt.config.strict import PositiveInt, Strict
from hybrid_opt.errors import did_you_mean

SLOPE_STEPS = 20
"""Latest steps of a phase over which the slope of the loss is taken."""

COUNTED = {
    "steps": "steps",
    "seconds": "time of steps",
    "joules": "energy of steps, where the device reports it",
    "tokens": "tokens that forward passes processed",
    "forwards": "forward passes over a batch",
    "backwards": "backward passes over a batch",
    "forward_equivalents": "computing, in forward passes over a whole batch",
}
"""Signals that count from the start of the phase."""

MEASURED = {
    "loss": "training loss of the latest step",
    "loss_slope": f"its change per step, by least squares over the phase's latest {SLOPE_STEPS} steps that had one",
    "probe_loss": "loss on the probe rows when it was last measured for the schedule",
    "validation_loss": "loss of the latest evaluation along the way",
    "peak_memory_bytes": "most memory used in the latest step",
    "free_memory_bytes": "memory that the process could still allocate after it",
}
"""Signals of the whole run."""

OF_ESTIMATORS = {
    "loss": "loss that the estimator saw",
    "snr": "odd over even variance of the losses of antithetic pairs",
    "pair_correlation": "correlation of the losses of antithetic pairs, (1 - snr) / (1 + snr): -1 is all slope, above 0 is noise",
    "gradient_norm": "norm of the gradient, as the losses tell it",
    "cosine": "with backprop's gradient, in steps of both",
    "rho2": "share of the gradient's energy along the estimate, in steps of both",
    "guide_rho2": "share of the gradient's energy in the guides' span",
    "curvature": "mean curvature along the directions",
    "trust_factor": "what the learning rate was multiplied by to keep to `trust`",
    "reward": "mean reward",
    "nonfinite_members": "members whose loss was not finite",
    "tied_pairs": "pairs that were equally good",
    "loss_decrease_per_second": "fall of the probe loss over its latest turn alone, per second of steps",
    "loss_decrease_per_forward_equivalent": "the same per forward pass over a whole batch",
}
"""Signals of one estimator, written `name.signal`; those of its statistics that it reports."""


class Trigger(Strict):
    """A signal that is above or below a limit for some measurements in a row.

    A step in which it was not measured (an estimator rested, there was no evaluation) neither counts nor begins the row anew.
    """

    model_config = {"serialize_by_alias": True}

    signal: str
    """Name of the signal: `loss_slope`, `seconds`, or of an estimator `es.snr`."""
    above: float | None = None
    """Met when the signal is above this."""
    below: float | None = None
    """Met when the signal is below this."""
    in_a_row: PositiveInt = Field(1, alias="for")
    """Measurements in a row that must meet it."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.above is None) == (self.below is None):
            raise ValueError("a trigger needs either above or below; write one of them")
        return self

    @model_validator(mode="after")
    def _signal_exists(self) -> Self:
        estimator, dot, name = self.signal.rpartition(".")
        known = OF_ESTIMATORS if dot else {**COUNTED, **MEASURED}
        if name not in known or (dot and not estimator):
            of = "an estimator's signals are" if dot else "of the run there are"
            raise ValueError(
                f"there is no signal {self.signal!r}; {of} {', '.join(known)}{did_you_mean(name, known)}"
                + ("" if dot else "; of an estimator NAME.snr and others")
            )
        return self

    @property
    def estimator(self) -> str | None:
        """Whose signal it is; None: the run's."""
        return self.signal.rpartition(".")[0] or None

    def is_met(self, value: float) -> bool:
        """Whether a value is beyond the limit."""
        return value > self.above if self.above is not None else value < self.below

    def __str__(self) -> str:
        limit = f"above {self.above:g}" if self.above is not None else f"below {self.below:g}"
        return f"{self.signal} {limit}" + (f" {self.in_a_row} times in a row" if self.in_a_row > 1 else "")
