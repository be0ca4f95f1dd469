"""Parameters in groups of DeepSpeed's optimizer, some of which rest in some phases. Next: `zero.py`.

One idea: phases may give backprop other parameters, and one optimizer serves them all if it steps only the groups of the phase.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor


def groups_of(owned: Sequence[Collection[str]], names: list[str]) -> list[list[str]]:
    """Parameters that the same phases give to backprop; the optimizer lets a group rest in the phases that do not."""
    groups: dict[tuple[bool, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(name in phase for phase in owned), []).append(name)
    return [members for phases, members in groups.items() if any(phases)]


def let_groups_rest(optimizer: torch.optim.Optimizer) -> None:
    """Hide the gradients of groups that rest from the optimizer's step, so that it leaves their weights and state alone."""
    hidden: list[tuple[Tensor, Tensor | None]] = []

    def hide(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for group in optimizer.param_groups:
            for p in group["params"] if group.get("rests") else ():
                hidden.append((p, p.grad))
                p.grad = None

    def show(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        while hidden:
            p, gradient = hidden.pop()
            p.grad = gradient

    optimizer.register_step_pre_hook(hide)
    optimizer.register_step_post_hook(show)
