"""Contexts that put a model's switches back as they were: training mode and requires_grad. Next: `backprop.py`."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in training (dropout on) or evaluation mode (dropout off) inside; each one's own mode after."""
    others = [module for module in model.modules() if module.training != training]
    for module in others:
        module.training = training
    try:
        yield
    finally:
        for module in others:
            module.training = not training


@contextmanager
def requiring_grad(parameters: Mapping[str, nn.Parameter], names: Collection[str]) -> Iterator[None]:
    """Inside, of these parameters only the named ones require a gradient.

    Autograd then records nothing below the lowest layer that holds a named parameter.
    """
    before = {name: p.requires_grad for name, p in parameters.items()}
    for name, p in parameters.items():
        p.requires_grad_(name in names)
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.requires_grad_(before[name])
