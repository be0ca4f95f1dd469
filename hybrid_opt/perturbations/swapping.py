"""Other weights for a module while it runs. Next: `dense.py`.

One idea: a module's forward reads its weights when it is called, so a hook before it can put others in their place and
a hook after it puts the own ones back. The own ones are never written, and only one module's others exist at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn


def owners_of(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[nn.Module, dict[str, str]]:
    """For each module that owns some of the parameters: its attribute -> the parameter's name."""
    names = {id(p): name for name, p in parameters.items()}
    owners = {}
    for module in model.modules():
        own = {a: names[id(p)] for a, p in module._parameters.items() if id(p) in names}
        if own:
            owners[module] = own
    return owners


@contextmanager
def every_module_called() -> Iterator[None]:
    """Inside, torch's encoder layers call the modules that they are made of instead of one fused function."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


_swapping: ContextVar[bool] = ContextVar("modules_swap_weights", default=False)


def modules_swap_weights() -> bool:
    """Whether the model computes at the moment with weights that exist only while its modules run.

    Whoever reads its weights elsewhere would then read others.
    """
    return _swapping.get()


@contextmanager
def while_running(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], weights_of: Callable[[str], Tensor]
) -> Iterator[None]:
    """Inside, each module that owns some of the parameters computes with `weights_of(name)` instead.

    `weights_of` is called before each call of a module that owns the parameter; a tied one has several owners.
    """
    owners = owners_of(model, parameters)
    own_weights = {module: dict(module._parameters) for module in owners}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        for attribute, name in owners[module].items():
            module._parameters[attribute] = weights_of(name)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        module._parameters.update(own_weights[module])

    handles = []
    token = _swapping.set(_swapping.get() or bool(owners))
    try:
        for module in owners:
            handles += [
                module.register_forward_pre_hook(before),
                # First of the hooks: ZeRO-3's own, which comes later then, must find the own weights again.
                module.register_forward_hook(after, always_call=True, prepend=True),
            ]
        with every_module_called():
            yield
    finally:
        _swapping.reset(token)
        for handle in handles:
            handle.remove()
        for module, own in own_weights.items():
            module._parameters.update(own)
