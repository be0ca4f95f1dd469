"""Directions of which each is some noise and something of each guide. Next: `estimator.py`.

One idea: a linear map of noises and guides is a source of directions, read slice by slice as they are.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine
from hybrid_opt.estimators.guided.storage import Guide
from hybrid_opt.estimators.noise import Key, StepKey, gaussian


@dataclass(frozen=True)
class GuidedDirections:
    """`eps(key) = a z(key) + sum_j c_j guide_j`, z standard normal. A `Directions`."""

    guides: Sequence[Guide]
    mixture: Mapping[Key, tuple[float, Sequence[float]]]
    """a and c of each key."""

    def ready(self, engine: Engine, names: Collection[str], keys: Sequence[Key], key: StepKey) -> "GuidedDirections":
        """See `Directions.ready`: it was made for one step."""
        return self

    def read(self, keys: Sequence[Key], name: str, start: int, count: int, device: torch.device) -> Tensor:
        """See `Directions.read`. Products and sums are taken one by one, so a slice equals that of the whole."""
        result = torch.zeros(len(keys), count, device=device)
        noisy = [i for i, key in enumerate(keys) if self.mixture[key][0]]
        if noisy:
            drawn = gaussian([keys[i].fold(name) for i in noisy], start, count, device)
            for i, noise in zip(noisy, drawn, strict=True):
                result[i] = noise.mul_(self.mixture[keys[i]][0])
        for number, guide in enumerate(self.guides):
            factors = [self.mixture[key][1][number] for key in keys]
            if name in guide.by_name and any(factors):
                values = guide.by_name[name].read(start, count, device)
                for row, factor in zip(result, factors, strict=True):
                    row += values * factor
        return result
