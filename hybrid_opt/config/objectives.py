"""What a run file may say is minimised. Next: `rewards.py`, then `run.py`.

One idea: an objective is a `type` with its own options, and each says what it needs of the data.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from hybrid_opt.config.rewards import FUNCTION, Reward
from hybrid_opt.config.strict import Strict


class CausalLm(Strict):
    """Mean cross-entropy of an example's tokens, prompt left out."""

    type: Literal["causal_lm"]


class Choice(Strict):
    """Cross-entropy over the choices' sequence log-probabilities, and accuracy."""

    type: Literal["choice"]


class Function(Strict):
    """A function of your own: `losses(model, batch) -> Tensor (examples,)`."""

    type: Literal["function"]
    function: str
    """`module:function`, importable from the folder in which the command runs; it is run only with `--allow-code`."""
    differentiable: bool = True
    """False: only estimators that need no gradient may act."""

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, path: Any) -> Any:
        if not FUNCTION.fullmatch(path):
            raise ValueError(f"{path!r} is not of the form module:function, such as losses:my_losses")
        return path


Objective = Annotated[CausalLm | Choice | Function | Reward, Field(discriminator="type")]
