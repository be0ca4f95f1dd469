"""The layers below all noise: the same for every member, so they read each prompt once. Next: `choosing.py`.

One idea: members part where the first perturbed layer begins. Below, a prompt has one row; from there on one for each member, until
members write different tokens. It pays where a policy lets ES move the last layers only.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import DynamicCache

from hybrid_opt.perturbations.factors import Factors
from hybrid_opt.perturbations.swapping import owners_of


class SharedLayers:
    """Knows how many of a model's layers come before all noise; seen in the first pass, and remembered."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, frozenset[str]], int] = {}

    def count(self, model: nn.Module, factors: Factors | None) -> int | None:
        """How many; 0 if none; None if it is not known yet."""
        return self._known.get(_key(model, factors)) if factors else 0

    @contextmanager
    def watched(self, model: nn.Module, factors: Factors) -> Iterator[None]:
        """Inside, the model makes a pass, from which the number is known."""
        names, done, found = factors.matrices.keys() | factors.vectors.keys(), [0], []
        parameters = {name: p for name, p in model.named_parameters() if name in names}
        with ExitStack() as stack:
            for i, layer in enumerate(decoder_layers(model)):
                handle = layer.register_forward_hook(lambda *_, i=i: done.__setitem__(0, i + 1))
                stack.callback(handle.remove)
            for module in owners_of(model, parameters):
                handle = module.register_forward_pre_hook(lambda *_: found.append(done[0]))
                stack.callback(handle.remove)
            yield
        self._known[_key(model, factors)] = found[0] if found else 0


def _key(model: nn.Module, factors: Factors) -> tuple[int, frozenset[str]]:
    return id(model), frozenset(factors.matrices.keys() | factors.vectors.keys())


def decoder_layers(model: nn.Module) -> Collection[nn.Module]:
    """The model's layers in order; none if they cannot be told."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    return next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count > 0), ())


@contextmanager
def parted_after(model: nn.Module, shared: int, members: int) -> Iterator[None]:
    """Inside, passes take a row for each prompt, and after so many layers have one for each member and prompt, member-major."""

    def parted(value: Any, rows: int) -> Any:
        return tree_map(lambda x: _repeated(x, rows, members), value)

    with ExitStack() as stack:
        layers, rows = list(decoder_layers(model)), [0]
        note = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: rows.__setitem__(0, len(args[0])))
        last = layers[shared - 1].register_forward_hook(lambda _, args, output: parted(output, rows[0]))
        above = [
            layer.register_forward_pre_hook(lambda _, *inputs: parted(inputs, rows[0]), with_kwargs=True)
            for layer in layers[shared:]
        ]
        for handle in (note, last, *above):
            stack.callback(handle.remove)
        yield


def part_caches(cache: DynamicCache, shared: int, members: int) -> None:
    """Let the shared layers, too, have a row for each member and prompt."""
    for layer in cache.layers[:shared]:
        rows = torch.arange(len(layer.keys), device=layer.keys.device)
        layer.batch_select_indices(rows.repeat(members))


def _repeated(x: Any, rows: int, members: int) -> Any:
    """A tensor that belongs to the rows, once for each member; anything else as it is."""
    if not isinstance(x, Tensor) or x.dim() < 2 or len(x) != rows:
        return x
    return x.repeat(members, *[1] * (x.dim() - 1))
