"""Rows to evaluate models on, and what is measured of them. Next: `run.py`.

One idea: a set of rows is the `data` and `objective` sections of a run file, in a file of their own where no run has them.
"""

from pydantic import model_validator
from typing_extensions import Self

from hybrid_opt.config.data import Data
from hybrid_opt.config.objectives import Objective
from hybrid_opt.config.run import refuse_unsuited_data
from hybrid_opt.config.strict import Strict


class RowSet(Strict):
    """Rows, and what is measured of them."""

    data: Data
    """Held-out rows (`validation`) if there are any, else all of `train`."""
    objective: Objective
    """Whose measures are taken: a loss, accuracy, a reward."""

    @model_validator(mode="after")
    def _objective_suits_data(self) -> Self:
        refuse_unsuited_data(self.objective, self.data)
        return self
