"""A first forward pass without noise, watched: which parameters are used how. Next: `swapping.py`.

One idea: hooks see what goes in and out of modules. A rehearsal finds out where that is not all there is to see, so that
noise that would not reach the losses, or would reach the wrong ones, is found before a single member is evaluated.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hybrid_opt.estimators.swapping import owners_of, while_running
from hybrid_opt.objectives.contract import Objective, count_examples, repeat, select


@dataclass(frozen=True)
class Rehearsal:
    """What a forward pass showed."""

    uncalled: frozenset[str]
    """Parameters whose module was not called."""
    outside: frozenset[str]
    """Parameters that were used outside their own module's forward, such as an embedding's weight multiplied elsewhere."""
    fixed_rows: Mapping[str, int]
    """Parameters whose module gets as many rows whatever the number of examples -> how many."""
    same_input: tuple[tuple[str, ...], ...]
    """Weights of modules that are called with the very same tensor, such as those of queries, keys and values."""
    bytes_per_example: int
    """Most memory that a module's input and output take, with two tensors more of the output's size."""


def rehearse(model: nn.Module, objective: Objective, batch: Any, parameters: Mapping[str, nn.Parameter]) -> Rehearsal:
    """Evaluate the losses of one or two examples, and of the same ones twice over, at the model's own weights."""
    few = _few(batch)
    once, outside = _watched(model, objective, few, parameters)
    examples = count_examples(few)
    twice = once if examples is None else _watched(model, objective, repeat(few, 2), parameters)[0]
    fixed = {name: max(rows) for name, rows in once.rows.items() if rows == twice.rows[name] and examples is not None}
    return Rehearsal(
        uncalled=frozenset(parameters.keys() - once.rows.keys()),
        outside=frozenset(outside),
        fixed_rows={name: rows for name, rows in fixed.items() if rows},
        same_input=_with_same_input(once.inputs),
        bytes_per_example=once.bytes // (examples or 1),
    )


def _few(batch: Any) -> Any:
    """Two examples where there are so many: losses are seldom written to expect a single one."""
    examples = count_examples(batch)
    return batch if examples is None or examples < 3 else select(batch, torch.arange(2))


class _Record:
    def __init__(self):
        self.rows: dict[str, set[int]] = {}
        self.inputs: list[tuple[str, Tensor]] = []
        self.bytes = 0


def _with_same_input(inputs: list[tuple[str, Tensor]]) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, dict[str, None]] = {}
    for name, x in inputs:
        groups.setdefault(id(x), {})[name] = None
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _watched(
    model: nn.Module, objective: Objective, batch: Any, parameters: Mapping[str, nn.Parameter]
) -> tuple[_Record, set[str]]:
    record, uses = _Record(), _Uses(parameters)
    with ExitStack() as stack:
        for module, names in owners_of(model, parameters).items():
            stack.enter_context(_recorded_rows(module, names, record))
        for module in model.modules():
            if not list(module.children()):
                stack.enter_context(_recorded_size(module, record))
        # A module sees other tensors of the same values, so a use of the parameter itself is a use outside.
        stack.enter_context(while_running(model, parameters, lambda name: parameters[name].detach()))
        stack.enter_context(uses)
        objective.losses(model, batch)
    return record, uses.seen


@contextmanager
def _recorded_rows(module: nn.Module, names: Mapping[str, str], record: _Record) -> Iterator[None]:
    def before(module, args, kwargs):
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if x is not None and "weight" in names:
            record.inputs.append((names["weight"], x))
        for name in names.values():
            record.rows.setdefault(name, set()).add(len(x) if x is not None and x.dim() else 0)

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _recorded_size(module: nn.Module, record: _Record) -> Iterator[None]:
    def after(module, args, output):
        inputs, outputs = (sum(t.nbytes for t in tree_leaves(x) if isinstance(t, Tensor)) for x in (args, output))
        record.bytes = max(record.bytes, inputs + 3 * outputs)

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


class _Uses(TorchFunctionMode):
    """Notes which of the parameters are handed to a torch function."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        super().__init__()
        self.names = {id(p): name for name, p in parameters.items()}
        self.seen: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if isinstance(result, (Tensor, list, tuple)) and function is not Tensor.detach:  # a shape or a dtype is no use
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.names:
                    self.seen.add(self.names[id(leaf)])
        return result
