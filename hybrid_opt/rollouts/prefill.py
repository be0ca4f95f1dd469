"""Reading the prompts into a key-value cache. Next: `shared_layers.py`.

One idea: what rows have in common is read once. All prompts of a batch that begin alike (instructions, examples) share the reading of
that beginning, once for each member, because the members' weights differ and so do their caches; in layers below all noise they do
not, and members share them.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hybrid_opt.objectives.language_model import forward_of
from hybrid_opt.perturbations.factors import Factors
from hybrid_opt.rollouts.shared_layers import SharedLayers, decoder_layers, part_caches, parted_after

WORTHWHILE = 32
"""Tokens saved from which on it pays to read a common beginning in a pass of its own."""


@dataclass
class Parts:
    """The members among the rows: `count` parts of equally many rows, one after the other."""

    count: int
    factors: Factors | None

    def have(self, rows: int) -> None:
        """Say that the next passes have this many rows of all members together."""
        if self.factors:
            self.factors.rows = rows

    def alike(self, ids: Tensor, mask: Tensor) -> bool:
        """Whether all parts, more than one, have the same prompts; ids, mask: (rows, tokens)."""
        first = len(ids) // self.count
        same = (bool((x.view(self.count, first, -1) == x[:first]).all()) for x in (ids, mask))
        return self.count > 1 and all(same)

    def shrunk(self, finished: Tensor, leaving: float) -> Tensor | None:
        """Numbers of the rows to keep, as many of each part, so that all unfinished ones are kept; None if too few would leave."""
        parts = finished.view(self.count, -1)
        needed = max(1, int((~parts).sum(dim=1).max()))  # one, if only other ranks still write
        if needed > (1 - leaving) * parts.shape[1]:
            return None
        order = parts.to(torch.uint8).argsort(dim=1, stable=True)[:, :needed].sort(dim=1).values
        self.have(self.count * needed)
        return (order + torch.arange(self.count, device=order.device).unsqueeze(1) * parts.shape[1]).flatten()


@contextmanager
def sharing(factors: Factors | None) -> Iterator[Parts]:
    """The parts of a batch whose rows may leave; afterwards the hooks expect as many rows as before."""
    parts = Parts(factors.scale.numel() if factors else 1, factors)
    rows = factors.rows if factors else 0
    try:
        yield parts
    finally:
        parts.have(rows)


class Context:
    """What has been read and written so far, in a cache.

    Args:
        model: a causal language model.
    """

    def __init__(self, model: nn.Module) -> None:
        takes = inspect.signature(forward_of(model)).parameters
        self.model, self.cache = model, DynamicCache(config=model.config.get_text_config(decoder=True))
        self.has_positions, self.has_keep = "position_ids" in takes, "logits_to_keep" in takes
        self.mask: Tensor | None = None
        self.positions: Tensor | None = None

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read tokens of each row; ids, mask: (rows, tokens), padded on the left. Returns the last position's logits (rows, vocabulary)."""
        first = 0 if self.positions is None else self.positions.unsqueeze(1)
        positions = (mask.cumsum(1) - 1).clamp(min=0) + first
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        self.positions = positions[:, -1] + 1
        arguments = {"position_ids": positions} if self.has_positions else {}
        arguments |= {"logits_to_keep": 1} if self.has_keep else {}
        output = self.model(
            input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **arguments
        )
        return output.logits[:, -1]

    def next(self, tokens: Tensor) -> Tensor:
        """Read one more token of each row, (rows,); see `read`."""
        return self.read(tokens.unsqueeze(1), torch.ones_like(tokens).unsqueeze(1))

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def repeat(self, times: int) -> None:
        """Each row goes on as so many rows."""
        self.cache.batch_repeat_interleave(times)
        self.mask = self.mask.repeat_interleave(times, dim=0)
        self.positions = self.positions.repeat_interleave(times, dim=0)


def cache_bytes(model: nn.Module, tokens: int) -> int:
    """Size of a row's keys and values of so many tokens, in all layers."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * tokens * next(model.parameters()).element_size()


class Prefill:
    """Reads the prompts of a batch, what they have in common once.

    Args:
        beginnings: whether that goes for how they begin. Not in a rehearsal, which compares passes of few rows and of more.
    """

    def __init__(self, beginnings: bool = True) -> None:
        self.worthwhile = WORTHWHILE if beginnings else math.inf
        self.shared_layers = SharedLayers()

    def __call__(self, model: nn.Module, ids: Tensor, mask: Tensor, parts: Parts) -> tuple[Tensor, Context]:
        """Logits after each row's prompt, (rows, vocabulary), and the context to go on with.

        Args:
            ids, mask: (rows, tokens), padded on the left.
        """
        context = Context(model)
        shared = self.shared_layers.count(model, parts.factors)
        if shared is None:
            with self.shared_layers.watched(model, parts.factors):
                return self._read(context, ids, mask, parts.count, parts), context
        if not shared or not parts.alike(ids, mask) or len(context.cache.layers) != len(decoder_layers(model)):
            return self._read(context, ids, mask, parts.count, parts), context
        own = len(ids) // parts.count
        with parted_after(model, shared, parts.count):
            logits = self._read(context, ids[:own], mask[:own], 1, parts)
        part_caches(context.cache, shared, parts.count)
        context.mask, context.positions = context.mask.repeat(parts.count, 1), context.positions.repeat(parts.count)
        return logits, context

    def _read(self, context: Context, ids: Tensor, mask: Tensor, groups: int, parts: Parts) -> Tensor:
        """Read rows that come in `groups` of equal weights, a beginning that all have in common once for each group."""
        each = len(ids) // groups
        common = _beginning_in_common(ids, mask) if each > 1 else 0
        # A sliding window is counted in columns, of which padding would be some.
        if (len(ids) - groups) * common < self.worthwhile or any(context.cache.is_sliding):
            return context.read(ids, mask)
        beginnings = ids[0, ids.shape[1] - int(mask[0].sum()) :][:common].expand(groups, -1)
        parts.have(parts.count)
        context.read(beginnings, torch.ones_like(beginnings))
        context.repeat(each)
        parts.have(parts.count * each)
        return context.read(*_rest(ids, mask, common))


def _beginning_in_common(ids: Tensor, mask: Tensor) -> int:
    """Tokens with which all rows begin, and after which each has at least one more."""
    flush = _flush_left(ids, mask)
    shortest = int(mask.sum(1).min())
    differs = (flush[:, :shortest] != flush[0, :shortest]).any(dim=0)
    return min(int(differs.long().argmax()) if differs.any() else shortest, shortest - 1)


def _flush_left(ids: Tensor, mask: Tensor) -> Tensor:
    """Rows that begin in the first column, with their padding at the end."""
    width = ids.shape[1]
    shift = width - mask.sum(1, keepdim=True)
    return ids.gather(1, (torch.arange(width, device=ids.device) + shift) % width)


def _rest(ids: Tensor, mask: Tensor, common: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded on the left, of what comes after the beginning."""
    lengths = mask.sum(1, keepdim=True) - common
    width = int(lengths.max())
    return ids[:, -width:], (torch.arange(width, 0, -1, device=ids.device) <= lengths).to(mask.dtype)
