"""Dense perturbation: every weight gets a noise value of its own. Next: `low_rank.py`.

One idea: weights are written in place for one member at a time and restored from a copy, never by subtracting the noise
again: 100 rounds of adding and subtracting change bfloat16 weights by 3.9 % (float32 by 6e-7).
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.estimators.noise import DISTRIBUTIONS, Key, block_size
from hybrid_opt.estimators.perturbation import Member
from hybrid_opt.objectives.contract import Objective


class DensePerturbation:
    """`w + sign * sigma * eps`, eps of independent gaussian or rademacher values.

    Works for any module. Memory: the weights twice, and the float32 noise of one parameter.
    """

    def __init__(self, distribution: str, sigma: float):
        self.noise = DISTRIBUTIONS[distribution]
        self.sigma = sigma

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """Every parameter of every module can be written."""

    def evaluate(
        self, engine: Engine, objective: Objective, batch: Any, names: Collection[str], members: Sequence[Member]
    ) -> Tensor:
        """See `Perturbation.evaluate`: one forward pass a member."""
        losses = []
        with _restored(engine, names) as originals:
            for member in members:
                for name, original in originals.items():
                    self._perturb(engine.parameters[name].data, original, member, name)
                losses.append(objective.losses(engine.model, batch).float())
        return torch.stack(losses)

    def combine(self, keys: Sequence[Key], coefficients: Tensor, shard: Shard) -> Tensor:
        """See `Perturbation.combine`. Products and sums are taken one by one, so a slice equals that of the whole."""
        count, device = shard.data.numel(), shard.data.device
        total = torch.zeros(count, device=device, dtype=torch.float32)
        keys = [key.fold(shard.name) for key in keys]
        block = block_size(device)
        for at in range(0, count, block):
            piece = total[at : at + block]
            directions = self.noise(keys, shard.start + at, len(piece), device)
            for direction, coefficient in zip(directions, coefficients.tolist(), strict=True):
                piece += direction.mul_(coefficient)
        return total

    def _perturb(self, weights: Tensor, original: Tensor, member: Member, name: str) -> None:
        noise = self.noise([member.key.fold(name)], 0, weights.numel(), weights.device).view_as(weights)
        weights.copy_(noise.mul_(member.sign * self.sigma).add_(original))


@contextmanager
def _restored(engine: Engine, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Copies of the named weights, put back at the end whatever happens."""
    originals = {name: engine.parameters[name].data.clone() for name in engine.parameters if name in names}
    try:
        yield originals
    finally:
        for name, original in originals.items():
            engine.parameters[name].data.copy_(original)
