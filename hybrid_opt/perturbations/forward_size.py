"""How many members and examples share a forward pass. Next: `factors.py`.

One idea: a population's rows, one for each member and example, are cut into pieces of even size. A piece is as large as
makes a forward pass efficient, as far as free memory allows; one that does not fit after all is cut in two.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine
from hybrid_opt.machine.memory import free_memory_bytes
from hybrid_opt.objectives.contract import Generates, Objective, count_elements

EFFICIENT = {"cpu": 1024, "cuda": 32768}
"""Tokens (elements of the largest tensor of a batch) in a forward pass from which on more make it no faster."""
SHARE_OF_FREE_MEMORY = 0.5
"""Activations are estimated from the largest module alone, so half of the free memory is left for the rest."""


@dataclass(frozen=True)
class Piece:
    """Members and examples of a forward pass, as slices of the members and of the examples that each sees."""

    members: slice
    examples: slice


class ForwardSize:
    """Cuts a population into forward passes.

    Args:
        members: members in a forward pass; None: by free memory.
        examples: examples of each member in a forward pass; None: all, where memory allows.
    """

    def __init__(self, members: int | None = None, examples: int | None = None) -> None:
        self.members, self.examples = members, examples
        self._fits: int | None = None  # rows that are known to fit, once some did not

    def evaluate(
        self,
        losses_of: Callable[[Piece], Tensor],
        objective: Objective,
        batch: Any,
        examples: Tensor,
        members_per_direction: int,
        bytes_per_example: int,
        engine: Engine,
        most: int | None = None,
    ) -> Tensor:
        """All losses, (members, examples of each) float32, piece by piece.

        Args:
            losses_of: losses of a piece, (its members, its examples).
            objective: what they are losses of.
            batch: the batch that examples are taken from.
            examples: numbers of the examples that each member sees, (members, k).
            members_per_direction: members that share noise; they are not parted where several directions fit.
            most: most members in a piece.
        """
        elements = count_elements(batch)
        if isinstance(objective, Generates):
            elements = objective.row_elements
            bytes_per_example += objective.row_bytes(engine.model, batch)
        rows = self._rows(max(1, elements), bytes_per_example, engine)
        todo = self._pieces(*examples.shape, members_per_direction, rows, most)
        losses = torch.empty(examples.shape, device=engine.device)
        while todo:
            piece = todo.pop(0)
            try:
                losses[piece.members, piece.examples] = losses_of(piece)
            except torch.OutOfMemoryError:
                if not (halves := _halves(piece)) or not engine.independent_forwards:
                    raise
                todo = halves + todo
                self._remember(_size(halves[0]))
        return losses

    def _rows(self, elements: int, bytes_per_example: int, engine: Engine) -> int:
        """Rows in a forward pass if nothing is prescribed; the same on all ranks where they run the model together."""
        efficient = math.ceil(EFFICIENT.get(engine.device.type, EFFICIENT["cuda"]) / elements)
        sharing = engine.ranks.on_this_machine if engine.device.type == "cpu" else 1
        free = free_memory_bytes(engine.device, engine.memory_limit)
        fits = int(SHARE_OF_FREE_MEMORY * free) // sharing // max(1, bytes_per_example)
        rows = max(1, min(efficient, fits, self._fits or fits))
        return rows if engine.independent_forwards else engine.ranks.least(rows)

    def _pieces(self, members: int, examples: int, together: int, rows: int, most: int | None) -> list[Piece]:
        examples_a_pass = min(examples, self.examples or rows)
        members_a_pass = min(self.members or max(1, rows // examples_a_pass), most or members)
        if self._fits is not None:
            examples_a_pass = min(examples_a_pass, self._fits)
            members_a_pass = min(members_a_pass, max(1, self._fits // examples_a_pass))
        if members_a_pass >= together:
            cuts = [
                slice(s.start * together, s.stop * together)
                for s in _evenly(members // together, members_a_pass // together)
            ]
        else:
            cuts = _evenly(members, members_a_pass)
        return [Piece(m, e) for m in cuts for e in _evenly(examples, examples_a_pass)]

    def _remember(self, rows: int) -> None:
        if self._fits is None:
            warnings.warn(
                f"out of memory in a forward pass; going on with {rows} rows (members times examples) in each. Set "
                "members_per_forward to a smaller number to start with that",
                RuntimeWarning,
                stacklevel=2,
            )
        self._fits = min(rows, self._fits or rows)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def one_by_one(losses_of: Callable[[Piece], Tensor], members: int) -> Tensor:
    """All losses of a batch without tensors, which cannot be cut or repeated: a forward pass for each member."""
    return torch.cat([losses_of(Piece(slice(i, i + 1), slice(None))) for i in range(members)])


def _evenly(count: int, at_most: int) -> list[slice]:
    """`count` things in as few slices as `at_most` allows, whose sizes differ by one at most."""
    parts = math.ceil(count / at_most)
    edges = [i * count // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _size(piece: Piece) -> int:
    return (piece.members.stop - piece.members.start) * (piece.examples.stop - piece.examples.start)


def _halves(piece: Piece) -> list[Piece]:
    """The piece cut by its members, or by its examples if it has one member; nothing if it is a single row."""
    for field in ("members", "examples"):
        whole: slice = getattr(piece, field)
        if (count := whole.stop - whole.start) > 1:
            middle = whole.start + count // 2
            return [
                Piece(**{**vars(piece), field: part})
                for part in (slice(whole.start, middle), slice(middle, whole.stop))
            ]
    return []
