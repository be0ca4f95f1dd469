"""A first forward pass without noise, watched: which parameters are used how. Next: `swapping.py`.

One idea: hooks see what goes in and out of modules. A rehearsal finds out where that is not all there is to see, so that
noise that would not reach the losses, or would reach the wrong ones, is found before a single member is evaluated.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hybrid_opt.engines.contract import Engine, is_spread
from hybrid_opt.objectives.contract import Generates, Objective, count_examples, select
from hybrid_opt.objectives.generators import Generators
from hybrid_opt.perturbations.factors import is_same
from hybrid_opt.perturbations.swapping import owners_of, while_running

ORDER = {1: [0, 0], 2: [0, 1, 1, 0]}
"""One or two examples twice over; in another order than before, so that equally many rows do not pass for equal ones."""
TOLERANCE = 0.1
"""Rows of random values differ by about 1; bfloat16 rounds a deep model's by some 0.01, and other kernels other ways."""


@dataclass(frozen=True)
class Rehearsal:
    """What a forward pass showed."""

    uncalled: frozenset[str]
    """Parameters whose module was not called."""
    outside: frozenset[str]
    """Parameters that were used outside their own module's forward, such as an embedding's weight multiplied elsewhere."""
    fixed_rows: Mapping[str, int]
    """Parameters whose module gets as many rows whatever the number of examples -> how many. One row of numbers for everybody,
    (1, columns), is left out: its lookups can be dealt out."""
    scattered_rows: Mapping[str, int]
    """Parameters whose module gets rows that do not come example by example -> how many."""
    same_input: tuple[tuple[str, ...], ...]
    """Weights of linear layers that get the very same tensor one after the other, such as those of queries, keys and values."""
    bytes_per_example: int
    """Most memory that a module's input and output take, with two tensors more of the output's size."""


def rehearse(engine: Engine, objective: Objective, batch: Any, parameters: Mapping[str, nn.Parameter]) -> Rehearsal:
    """Evaluate the losses of one or two examples, and of the same ones twice over, at the model's own weights."""
    objective = objective.rehearsal() if isinstance(objective, Generates) else objective
    with Generators(engine.device).left_alone():  # after an interruption it is made once more
        (once, again, twice), examples = _runs(engine, objective, batch, parameters)
    fixed: dict[str, int] = {}
    scattered: dict[str, int] = {}
    steady = again is not None and once.begins_like(again)  # else the objective draws its inputs at random
    for name, calls in once.calls.items() if twice is not None and examples is not None else ():
        for i, (first, second) in enumerate(zip(calls, twice.calls.get(name, []), strict=False)):
            if first.is_fixed(second):
                fixed[name] = first.shape[0]
            # Later calls may differ because an objective samples, or rounds to, other tokens.
            elif first.shape[0] != second.shape[0] and (
                first.shape[0] % examples or (steady and i == 0 and not first.agrees(second, ORDER[examples]))
            ):
                scattered[name] = first.shape[0]
    return Rehearsal(
        uncalled=frozenset(parameters.keys() - once.calls.keys()),
        outside=frozenset(once.outside),
        fixed_rows=fixed,
        scattered_rows={name: rows for name, rows in scattered.items() if name not in fixed},
        same_input=tuple(tuple(dict.fromkeys(names)) for names in once.groups if len(set(names)) > 1),
        bytes_per_example=once.bytes // (examples or 1),
    )


def _runs(
    engine: Engine, objective: Objective, batch: Any, parameters: Mapping[str, nn.Parameter]
) -> tuple[tuple["_Record", "_Record | None", "_Record | None"], int | None]:
    """Records of a few examples, of the same once more, and twice over in `ORDER` (None if there is no room for them), and how
    many these few are."""
    model, count = engine.model, count_examples(batch)
    if count is None:
        return (_watched(model, objective, batch, parameters), None, None), None
    for few in (2, 1) if count > 1 else (1,):  # two where there are so many: losses are seldom written for a single one
        part, once = batch if count == few else select(batch, torch.arange(few)), None
        try:
            once = _watched(model, objective, part, parameters)
            again, twice = (
                _watched(model, objective, select(part, torch.tensor(order)), parameters)
                for order in (list(range(few)), ORDER[few])
            )
            return (once, again, twice), few
        except torch.OutOfMemoryError:
            if (few == 1 and once is None) or not engine.independent_forwards:
                raise
    return (once, None, None), few


@dataclass(frozen=True)
class _Call:
    """What a module was called with."""

    shape: torch.Size
    is_lookup: bool
    """Whether it is of integers."""
    rows: Tensor
    """A number for each row by which it can be told from others, (rows,), in units of its norm."""

    def is_fixed(self, doubled: "_Call") -> bool:
        one_for_all = self.is_lookup and len(self.shape) == 2 and self.shape[0] == 1 < self.shape[1]
        return self.shape[0] == doubled.shape[0] and not (one_for_all and self.shape == doubled.shape)

    def agrees(self, other: "_Call", order: Sequence[int] = (0,)) -> bool:
        """Whether the other call has this one's rows, example by example, for the examples in this order."""
        examples = max(order) + 1
        expected = self.rows.view(examples, len(self.rows) // examples)[list(order)].flatten()
        return other.rows.shape == expected.shape and torch.allclose(other.rows, expected, rtol=0, atol=TOLERANCE)


class _Record:
    def __init__(self) -> None:
        self.calls: dict[str, list[_Call]] = {}
        self.groups: list[list[str]] = []
        self.outside: set[str] = set()
        self.bytes = 0
        self._last: Tensor | None = None

    def note(self, module: nn.Module, names: Mapping[str, str], x: Tensor | None) -> None:
        for name in names.values():
            self.calls.setdefault(name, [])
            if x is not None and x.dim():
                self.calls[name].append(
                    _Call(x.shape, not x.is_floating_point(), _told_apart(x.unsqueeze(-1).flatten(1).float()))
                )
        if type(module) is nn.Linear and "weight" in names and x is not None:
            if self._last is None or not is_same(self._last, x):
                self.groups.append([])
            self.groups[-1].append(names["weight"])
            self._last = x

    def begins_like(self, other: "_Record") -> bool:
        """Whether each module was first called with the same rows."""
        firsts = [(calls[0], other.calls.get(name)) for name, calls in self.calls.items() if calls]
        return all(others and first.agrees(others[0]) for first, others in firsts)


def _told_apart(rows: Tensor) -> Tensor:
    """Each row's product with a fixed vector of no simple form."""
    projection = torch.arange(1, rows.shape[1] + 1, device=rows.device).sqrt().mul_(17).sin_()
    return (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)) @ projection


def _watched(model: nn.Module, objective: Objective, batch: Any, parameters: Mapping[str, nn.Parameter]) -> _Record:
    record = _Record()
    uses = _Uses(parameters, record)
    with ExitStack() as stack:
        for module, names in owners_of(model, parameters).items():
            stack.enter_context(_recorded_calls(module, names, record, uses))
        for module in model.modules():
            if not list(module.children()):
                stack.enter_context(_recorded_size(module, record))
        # A module sees other tensors of the same values, so a use of the parameter itself is a use outside.
        stack.enter_context(while_running(model, parameters, uses.alias))
        stack.enter_context(uses)
        objective.losses(model, batch)
    return record


@contextmanager
def _recorded_calls(module: nn.Module, names: Mapping[str, str], record: _Record, uses: "_Uses") -> Iterator[None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        with uses.paused():  # what is computed for the record is no use either
            record.note(module, names, x)

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _recorded_size(module: nn.Module, record: _Record) -> Iterator[None]:
    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inputs, outputs = (sum(t.nbytes for t in tree_leaves(x) if isinstance(t, Tensor)) for x in (args, output))
        record.bytes = max(record.bytes, inputs + 3 * outputs)

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


class _Uses(TorchFunctionMode):
    """Notes which of the parameters are handed to a torch function that makes tensors of them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], record: _Record) -> None:
        super().__init__()
        self.parameters = parameters
        self.names = {id(p): name for name, p in parameters.items()}
        self.record = record
        self.pauses = False

    def alias(self, name: str) -> Tensor:
        """Another tensor of a parameter's values."""
        with self.paused():
            return self.parameters[name].detach()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is noted."""
        self.pauses = True
        try:
            yield
        finally:
            self.pauses = False

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not self.pauses and any(
            isinstance(leaf, Tensor) for leaf in tree_leaves(result)
        ):  # a shape or a dtype is no use
            for leaf in tree_leaves((args, kwargs)):
                # ZeRO-3 looks at the `data` of what it gathers.
                if id(leaf) in self.names and not (is_spread(leaf) and function.__name__ == "__get__"):
                    self.record.outside.add(self.names[id(leaf)])
        return result
