"""float32 weights to add updates to, whatever the model's own are. Next: `direct.py`.

One idea: for a float32 model the weights are the model's own; for a narrower one they are a copy that is kept (a master), or one
parameter's copy made for the update and rounded back at once.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Shard
from hybrid_opt.engines.rounding import round_stochastically
from hybrid_opt.errors import UserError
from hybrid_opt.noise.keys import Key


class MasterWeights:
    """How updates add up in weights narrower than float32.

    Args:
        how: `fp32` keeps a float32 copy, `stochastic_rounding` rounds each update up or down at random (bfloat16 only), `none`
            rounds it to the nearest value.
        seed: decides the rounding.
    """

    def __init__(self, how: str, seed: int) -> None:
        self.keep, self.stochastic = how == "fp32", how == "stochastic_rounding"
        self.key = Key((seed, "rounding"))

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Whether the parameters can be rounded this way.

        Raises:
            UserError: stochastic rounding of another dtype than bfloat16.
        """
        for name, p in parameters.items() if self.stochastic else ():
            if p.dtype not in (torch.float32, torch.bfloat16):
                raise UserError(
                    f"engine.master_weights: stochastic_rounding rounds to bfloat16, but parameter {name} is "
                    f"{str(p.dtype).removeprefix('torch.')}; write fp32, or load the model in bfloat16"
                )

    def needed(self, weights: Tensor) -> bool:
        """Whether a float32 copy of the weights is to be kept."""
        return self.keep and weights.dtype != torch.float32

    @contextmanager
    def wide(self, shard: Shard, step: int) -> Iterator[Shard]:
        """The shard with float32 weights, which are rounded to its own at the end if it has narrower ones."""
        if shard.data.dtype == torch.float32:
            yield shard
            return
        wide = replace(shard, data=shard.data.float())
        yield wide
        if self.stochastic:
            round_stochastically(wide.data, shard.data, self.key.fold(shard.name), step, shard.start)
        else:
            shard.data.copy_(wide.data)
