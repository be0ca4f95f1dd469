"""When a run counts as diverging, and what happens then. Next: `training.py`."""

from typing import Annotated, Literal

from pydantic import model_validator
from typing_extensions import Self

from hybrid_opt.config.strict import Fraction, Number, PositiveInt, Strict


class Divergence(Strict):
    """Ends a run whose loss grows, or goes back to the weights that were best and on with lower learning rates."""

    loss_above: Annotated[float, Number] | None = None
    """A training or validation loss above this is divergence (of a reward: its negative)."""
    rises_for: PositiveInt | None = None
    """So many evaluations in a row with a validation loss above the best so far are divergence."""
    action: Literal["stop", "roll_back"] = "stop"
    """`stop` ends the run with an error. `roll_back` puts weights, optimizer and what estimators remember back to those of the best
    evaluation, kept in `checkpoints/best`; steps, schedule and data go on. It does so for a loss or weight that is not finite, too."""
    factor: Fraction = 0.5
    """What all learning rates are multiplied by at each roll back."""
    most: PositiveInt = 3
    """Roll backs after which the next divergence ends the run."""

    @property
    def needs_evaluations(self) -> bool:
        """Whether it has to know which weights are best."""
        return self.rises_for is not None or self.action == "roll_back"

    @model_validator(mode="after")
    def _says_when(self) -> Self:
        if self.loss_above is None and self.rises_for is None and self.action == "stop":
            raise ValueError(
                "it says neither when a run diverges nor to go back, and a loss that is not finite ends a run anyway; write "
                "loss_above, rises_for or action: roll_back"
            )
        return self
