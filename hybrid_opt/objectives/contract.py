"""What an objective is: a loss for each example of a batch. Next: `data.py`.

One idea: per-example losses serve every estimator. Backprop takes their mean; ES evaluates a batch repeated for many
members in one forward pass and tells the members' losses apart afterwards.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hybrid_opt.errors import UserError
from hybrid_opt.noise.keys import Key


class Objective(Protocol):
    """A function to minimise. A reward is minimised as its negative."""

    differentiable: bool
    """Whether `losses` can be backpropagated through."""

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of each example at the model's current weights: (examples,), floating point."""
        ...

    def measures(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """What an evaluation reports, each (examples,): at least `loss`; means over examples are shown."""
        ...


@runtime_checkable
class Generates(Objective, Protocol):
    """An objective for which the model writes, and whose losses are negative rewards, so that people are shown the reward.

    NaN among its losses means that an example could not be judged.
    """

    row_elements: int
    """Tokens of a row in most of its forward passes."""
    tally: "Tally"
    """What it has seen."""

    def seeded(self, batch: Any, key: Key) -> Any:
        """The batch with what its randomness follows from, for each example, so that members have their luck in common."""
        ...

    def rehearsal(self) -> Objective:
        """An objective with the same kind of forward passes, of which nobody is the judge."""
        ...

    def row_bytes(self, model: nn.Module, batch: Any) -> int:
        """Memory that it keeps for a row from one forward pass to the next."""
        ...


@runtime_checkable
class WeighsExamples(Objective, Protocol):
    """An objective in which an example weighs by what the whole batch holds, so it sees the batch before any part of it is evaluated."""

    def weighed(self, batch: Any) -> Any:
        """The batch with each example's weight in it."""
        ...


class Tally(Protocol):
    """Sums and counts of what an objective has seen since somebody last asked."""

    def take(self) -> dict[str, tuple[float, int]]:
        """Name -> sum and count, from now on anew; the names are always the same."""
        ...


class FunctionObjective:
    """An objective from a plain function `losses(model, batch) -> Tensor (examples,)`."""

    def __init__(self, function: Callable[[nn.Module, Any], Tensor], differentiable: bool = True) -> None:
        self.function = function
        self.differentiable = differentiable

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """The function's own result, checked.

        Raises:
            UserError: the function does not return a 1-D floating point tensor.
        """
        losses = self.function(model, batch)
        if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
            got = f"a {losses.dtype} tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else losses
            raise UserError(f"objective: {self.function} must return one loss an example, (examples,) float; got {got}")
        return losses

    def measures(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The losses alone."""
        return {"loss": self.losses(model, batch)}


class Closure:
    """A function without arguments as an objective.

    Args:
        function: returns the losses (examples,), or their mean, at the current weights.
    """

    differentiable = True

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function = function

    def losses(self, model: nn.Module, batch: None) -> Tensor:
        """The function's own result, checked."""
        try:
            losses = self.function()
        except RuntimeError as error:
            if "does not require grad" in str(error):
                raise UserError(
                    "the function given to step() seems to call backward, which is step's own affair; return the losses, or their mean"
                ) from error
            raise
        if not isinstance(losses, Tensor) or not losses.is_floating_point() or losses.dim() > 1:
            raise UserError(
                f"the function given to step() must return losses (examples,) or their mean, not {losses!r}"
            )
        return losses.reshape(-1)

    def measures(self, model: nn.Module, batch: None) -> dict[str, Tensor]:
        """The losses alone."""
        return {"loss": self.losses(model, batch)}


def as_objective(objective: Objective | Callable[[nn.Module, Any], Tensor] | None) -> Objective | None:
    """An Objective from a plain function; an Objective as it is."""
    if objective is None or hasattr(objective, "losses"):
        return objective
    if callable(objective):
        return FunctionObjective(objective)
    raise UserError(f"objective: expected losses(model, batch) -> Tensor (examples,), got {objective!r}")


def import_function(path: str, key: str = "objective.function") -> Callable:
    """The object at `module:function`, looked up from the current folder too.

    Args:
        key: where it was written, for messages.

    Raises:
        UserError: there is no such module or function.
    """
    module_name, _, name = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's own module raises
        problem = str(error) if isinstance(error, (ImportError, SyntaxError)) else f"{type(error).__name__}: {error}"
        raise UserError(f"{key}: cannot import {module_name!r}: {problem}") from error
    if not hasattr(module, name):
        raise UserError(f"{key}: module {module_name!r} has no {name!r}")
    if not callable(function := getattr(module, name)):
        raise UserError(f"{key}: {path} is not a function but {function!r}")
    return function


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with a function applied to its tensors, which may lie in mappings, lists and tuples."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        values = [map_tensors(function, value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def count_examples(batch: Any) -> int | None:
    """Size of the first dimension of the first tensor in a batch; None if it holds no tensor."""
    sizes: list[int] = []
    map_tensors(lambda t: sizes.append(len(t)) or t if t.dim() else t, batch)
    return sizes[0] if sizes else None


def count_elements(batch: Any) -> int:
    """Elements of an example in the batch's largest tensor: for token ids the number of tokens."""
    sizes = [0]
    map_tensors(lambda t: sizes.append(t.numel() // max(1, len(t))) or t if t.dim() else t, batch)
    return max(sizes)


def count_tokens(batch: Any) -> int:
    """Tokens in a batch that are not padding; 0 for a batch that is not of token ids."""
    if isinstance(batch, dict) and "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    if isinstance(batch, dict) and "input_ids" in batch:
        return batch["input_ids"].numel()
    return 0


def select(batch: Any, examples: Tensor) -> Any:
    """The batch with these of its examples, by number, in this order; a number may come several times.

    The first dimension of every tensor is taken to be the examples, and so is a list without tensors that is as long.
    """
    count, numbers = count_examples(batch), examples.tolist()

    def walk(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: walk(value) for key, value in part.items()}
        if isinstance(part, (list, tuple)) and count_examples(part) is None:
            return type(part)(part[i] for i in numbers) if len(part) == count else part
        if isinstance(part, (list, tuple)):
            values = [walk(value) for value in part]
            return type(part)(*values) if hasattr(part, "_fields") else type(part)(values)
        return part[examples.to(part.device)] if isinstance(part, Tensor) and part.dim() else part

    return walk(batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    return map_tensors(lambda t: t.to(device), batch)
