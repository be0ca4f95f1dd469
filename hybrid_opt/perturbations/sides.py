"""Where the two thin sides of a matrix's low rank noise come from. Next: `drawn_noise.py`.

One idea: a matrix (m, n) gets noise `B^T A` with B (r, m) and A (r, n), and whether both are drawn for each direction or one of them
lasts for many steps, those who evaluate and add up need not know.
"""

import math
from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hybrid_opt.config.perturbations import LazySubspace
from hybrid_opt.engines.contract import Engine, whole_shape
from hybrid_opt.errors import UserError
from hybrid_opt.noise.drawing import gaussian
from hybrid_opt.noise.keys import Key, StepKey


class Sides(Protocol):
    """A source of the sides of low rank noise, scaled so that a direction is `B^T A`."""

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """Raise UserError for a matrix that is too small."""
        ...

    def ready(self, key: StepKey) -> "Sides":
        """The source for one step."""
        ...

    def values(self, shape: torch.Size) -> int:
        """How many values are drawn for each direction of a matrix (m, n)."""
        ...

    def split(self, noise: Tensor, names: Sequence[str], shape: torch.Size) -> tuple[Tensor, Tensor]:
        """B (names, directions, r, m) and A (names, directions, r, n), float32; what all directions share has 1 instead of directions.

        Args:
            noise: the values drawn for matrices of one shape, (names, directions, values); it may become the result.
        """
        ...

    def rows(
        self, keys: Sequence[Key], name: str, shape: torch.Size, first: int, last: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """B (keys, r, last - first) for some of a matrix's rows, and A (keys, r, n)."""
        ...


@dataclass(frozen=True)
class FreshSides:
    """`E = B^T A / sqrt(r)`, both standard normal and drawn for each direction; A comes first in a key's noise."""

    rank: int

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Sides.check`: there is noise of any rank."""

    def ready(self, key: StepKey) -> "FreshSides":
        """See `Sides.ready`: nothing depends on the step."""
        return self

    def values(self, shape: torch.Size) -> int:
        """See `Sides.values`."""
        return self.rank * sum(shape)

    def split(self, noise: Tensor, names: Sequence[str], shape: torch.Size) -> tuple[Tensor, Tensor]:
        """See `Sides.split`."""
        r, (m, n) = self.rank, shape
        a, b = noise.split([r * n, r * m], dim=-1)
        return (b.div_(math.sqrt(r)) if r > 1 else b).unflatten(-1, (r, m)), a.unflatten(-1, (r, n))

    def rows(
        self, keys: Sequence[Key], name: str, shape: torch.Size, first: int, last: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """See `Sides.rows`."""
        folded, r, (m, n) = [key.fold(name) for key in keys], self.rank, shape
        if (first, last) == (0, m):
            b, a = self.split(gaussian(folded, 0, self.values(shape), device).unsqueeze(0), [name], shape)
            return b[0], a[0]
        a = gaussian(folded, 0, r * n, device)
        b = [gaussian(folded, r * n + k * m + first, last - first, device) for k in range(r)]
        return torch.stack(b, dim=1).div_(math.sqrt(r)), a.view(-1, r, n)


class LazySides:
    """`E = s U V^T`: U (m, r) lasts for `refresh` steps, V (n, r) is standard normal and drawn for each direction.

    With `side: right` it is V that lasts. What lasts is drawn from the run's seed and the number of the stretch of steps, so it is the
    same on all ranks and in a resumed run, and is kept only as a cache: the sides of one stretch, float32. An orthonormal basis is the
    Q of a QR decomposition of Gaussian values, in float64 on the CPU. Sources: LOZO (arXiv 2410.07698), SubZero (arXiv 2410.08989).
    """

    def __init__(self, config: LazySubspace) -> None:
        self.config = config
        self.key: Key | None = None
        self._lasting: dict[tuple[Key, str, torch.device], Tensor] = {}  # shared by the sources of all steps

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Sides.check`: there are no more orthonormal vectors than dimensions."""
        for name in names if self.config.basis == "orthonormal" else ():
            shape = whole_shape(engine.parameters[name])
            if len(shape) == 2 and self.config.noise_rank > self._length(shape):
                raise UserError(
                    f"perturbation lazy_subspace: noise_rank {self.config.noise_rank} is more than the {self._length(shape)} "
                    f"{'rows' if self.config.side == 'left' else 'columns'} of {name} {tuple(shape)}, so there is no orthonormal basis; "
                    f"write noise_rank: {self._length(shape)} or less, basis: gaussian, or exclude {name} by the policy"
                )

    def ready(self, key: StepKey) -> "LazySides":
        """See `Sides.ready`: forgets what lasted in another stretch of steps."""
        result = copy(self)
        result.key = key.lasting(self.config.refresh, "lazy_subspace")
        for place in [place for place in self._lasting if place[0] != result.key]:
            del self._lasting[place]
        return result

    def values(self, shape: torch.Size) -> int:
        """See `Sides.values`: those of the fresh side."""
        return self.config.noise_rank * (sum(shape) - self._length(shape))

    def split(self, noise: Tensor, names: Sequence[str], shape: torch.Size) -> tuple[Tensor, Tensor]:
        """See `Sides.split`."""
        fresh = noise.unflatten(-1, (self.config.noise_rank, -1))
        lasting = torch.stack([self._side(name, shape, noise.device) for name in names]).unsqueeze(1)
        return (lasting, fresh) if self.config.side == "left" else (fresh, lasting)

    def rows(
        self, keys: Sequence[Key], name: str, shape: torch.Size, first: int, last: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """See `Sides.rows`."""
        folded, r = [key.fold(name) for key in keys], self.config.noise_rank
        lasting = self._side(name, shape, device).expand(len(keys), -1, -1)
        if self.config.side == "left":
            return lasting[..., first:last], gaussian(folded, 0, r * shape[1], device).view(-1, r, shape[1])
        fresh = [gaussian(folded, k * shape[0] + first, last - first, device) for k in range(r)]
        return torch.stack(fresh, dim=1), lasting

    def _length(self, shape: torch.Size) -> int:
        return shape[0] if self.config.side == "left" else shape[1]

    def _side(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        """What lasts of a matrix, s U^T (r, m) or s V^T (r, n)."""
        assert self.key is not None, "sides are read once they are ready"
        place = (self.key, name, device)
        if place not in self._lasting:
            r, length = self.config.noise_rank, self._length(shape)
            drawn = gaussian([self.key.fold(name)], 0, r * length, torch.device("cpu")).view(r, length)
            if self.config.basis == "orthonormal":
                drawn = torch.linalg.qr(drawn.double().T).Q.T.float()
            self._lasting[place] = (drawn * self._scale(length)).to(device).contiguous()
        return self._lasting[place]

    def _scale(self, length: int) -> float:
        """s: see `LazySubspace.norm_alignment`."""
        full = 1 / self.config.noise_rank if self.config.norm_alignment else 1 / length
        return math.sqrt(full * (length if self.config.basis == "orthonormal" else 1))
