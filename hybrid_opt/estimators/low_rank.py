"""Low rank perturbation: many members share one forward pass, and weights are never written. Next: `member_hooks.py`.

One idea: a matrix's noise is `E = B A^T / sqrt(r)` with B (m, r) and A (n, r) standard normal, so a layer's output for a
perturbed matrix is its plain output plus two thin products, which can differ from row to row of a batch.
Source: EGGROLL (arXiv 2511.16652).
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.member_hooks import Factors, perturbed_members, supported_owners
from hybrid_opt.estimators.noise import Key, gaussian
from hybrid_opt.estimators.perturbation import Member
from hybrid_opt.objectives.contract import Objective, count_examples, repeat


class LowRankPerturbation:
    """`W + sign * sigma / sqrt(r) * B A^T` for a matrix W (m, n); `w + sign * sigma * eps` for a vector."""

    def __init__(self, noise_rank: int, sigma: float, members_per_forward: int):
        self.noise_rank = noise_rank
        self.sigma = sigma
        self.members_per_forward = members_per_forward

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Perturbation.check`."""
        supported_owners(engine.model, {name: engine.parameters[name] for name in names})

    def evaluate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], members: Sequence[Member]
    ) -> Tensor:
        """See `Perturbation.evaluate`. The batch is repeated for each member, member-major.

        Raises:
            UserError: a parameter belongs to a module that cannot be evaluated this way; see `member_hooks`.
        """
        shapes = {name: engine.parameters[name].shape for name in engine.parameters if name in names}
        examples = count_examples(batch)  # None: a batch without tensors cannot be repeated, so members go one by one
        parts = math.ceil(len(members) / self.members_per_forward) if examples is not None else len(members)
        losses = []
        for part in torch.arange(len(members)).tensor_split(parts):
            some = [members[i] for i in part.tolist()]
            rows = len(some) * (examples or 1)
            with perturbed_members(engine.model, engine.parameters, self._factors(shapes, some, rows, engine.device)):
                found = objective.losses(engine.model, repeat(batch, len(some)) if examples is not None else batch)
            if examples is not None and len(found) != rows:
                raise UserError(
                    f"objective: it returned {len(found)} losses for a batch of {rows} examples; return one for each, and let "
                    "the first dimension of every tensor in a batch be the examples"
                )
            losses.append(found.float().view(len(some), -1))
        return torch.cat(losses)

    def combine(self, keys: Sequence[Key], coefficients: Tensor, shard: Shard) -> Tensor:
        """See `Perturbation.combine`. For a matrix, one product: `sum_i (c_i B_i) A_i^T = [c_i B_i]_i [A_i]_i^T`."""
        device, count = shard.data.device, shard.data.numel()
        c = coefficients.to(device, torch.float32)
        keys = [key.fold(shard.name) for key in keys]
        if len(shard.shape) != 2:
            return c @ gaussian(keys, shard.start, count, device)
        r, n = self.noise_rank, shard.shape[1]
        first, last = shard.start // n, -(-(shard.start + count) // n)  # the rows that the shard touches
        a = gaussian(_side(keys, "A"), 0, n * r, device).view(-1, n, r)
        b = gaussian(_side(keys, "B"), first * r, (last - first) * r, device).view(-1, last - first, r)
        b = b * (c / math.sqrt(r))[:, None, None]
        product = b.permute(1, 0, 2).flatten(1) @ a.permute(0, 2, 1).flatten(0, 1)
        offset = shard.start - first * n
        return product.view(-1)[offset : offset + count]

    def _factors(
        self, shapes: dict[str, torch.Size], members: Sequence[Member], rows: int, device: torch.device
    ) -> Factors:
        """Each member's noise, scaled and signed, ready to be multiplied with activations."""
        directions = list(dict.fromkeys(m.key for m in members))
        row = torch.tensor([directions.index(m.key) for m in members], device=device)
        scale = torch.tensor([m.sign * self.sigma for m in members], device=device)
        sides: dict[str, list[tuple[str, int]]] = {name: self._sides(shape) for name, shape in shapes.items()}
        draws = _draw_alike(
            [(name, side, count) for name, pairs in sides.items() for side, count in pairs], directions, device
        )
        factors = Factors(len(members), rows, {}, {})
        for name, shape in shapes.items():
            if len(shape) == 2:
                a = draws[name, "A"][row].view(len(members), shape[1], self.noise_rank)
                b = draws[name, "B"][row].view(len(members), shape[0], self.noise_rank)
                factors.matrices[name] = (a, b * (scale / math.sqrt(self.noise_rank))[:, None, None])
            else:
                factors.vectors[name] = draws[name, ""][row].mul_(scale[:, None]).view(len(members), *shape)
        return factors

    def _sides(self, shape: torch.Size) -> list[tuple[str, int]]:
        if len(shape) == 2:
            return [("A", shape[1] * self.noise_rank), ("B", shape[0] * self.noise_rank)]
        return [("", shape.numel())]


def _side(keys: Sequence[Key], side: str) -> list[Key]:
    return [key.fold(side) for key in keys] if side else list(keys)


def _draw_alike(
    wanted: Iterable[tuple[str, str, int]], directions: Sequence[Key], device: torch.device
) -> dict[tuple[str, str], Tensor]:
    """Noise (directions, count) for each (name, side, count); equal counts are drawn together, which is much faster."""
    by_count: dict[int, list[tuple[str, str]]] = {}
    for name, side, count in wanted:
        by_count.setdefault(count, []).append((name, side))
    draws = {}
    for count, pairs in by_count.items():
        keys = [key for name, side in pairs for key in _side([d.fold(name) for d in directions], side)]
        values = gaussian(keys, 0, count, device).view(len(pairs), len(directions), count)
        draws.update(zip(pairs, values, strict=True))
    return draws
