"""How far each step moved each layer, and who moved it. Next: `../run_files/metrics.py`.

One idea: the weights are looked at before and after a step, so it does not matter by which rule, optimizer or engine they were moved;
and a fixed sample of each parameter is enough, so it costs neither memory nor a second read of the estimates.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from hybrid_opt.engines.contract import Engine, Shard, whole_shape
from hybrid_opt.scheduling.policy import layer_number

SAMPLE = 4096
"""Most values that are looked at of a parameter: every k-th of its elements, the same in each step."""


class UpdateNorms:
    """Norms of the change of the weights between `before` and `after`; all ranks call both together.

    Args:
        engine: holds the weights.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def before(self, names: Collection[str]) -> None:
        """Remember the weights that may be about to move."""
        self.seen = {shard.name: _sample(shard).clone() for shard in self.engine.shards(names)}

    def after(self, owned: Mapping[str, Collection[str]]) -> dict[str, dict[str, float]]:
        """Euclidean norms `{who: {layer: norm}}`; who: an estimator, or several joined by +.

        The norm of a parameter's change is that of its sample, times the root of the number of its elements over that of the sample.

        Args:
            owned: for each estimator that has acted the parameters that it might move.
        """
        movers: dict[str, list[str]] = {}
        for estimator, names in owned.items():
            for name in names:
                movers.setdefault(name, []).append(estimator)
        squares = {shard.name: _square(_sample(shard), self.seen[shard.name]) for shard in self.engine.shards(movers)}
        names, device = list(movers), self.engine.device
        nothing = torch.zeros(2)
        # Fetched from the device once, not once a parameter.
        own = torch.stack([squares.get(name, nothing).to(device) for name in names]).cpu().double()
        norms: dict[str, dict[str, float]] = {}
        for name, (total, count) in zip(names, self.engine.ranks.gather(own).sum(dim=0).tolist(), strict=True):
            layers = norms.setdefault("+".join(movers[name]), {})
            size = whole_shape(self.engine.parameters[name]).numel()
            layers[layer_of(name)] = layers.get(layer_of(name), 0.0) + total / max(count, 1) * size
        return {who: {layer: square**0.5 for layer, square in layers.items()} for who, layers in norms.items()}


def layer_of(name: str) -> str:
    """The layer's number as text, or what a parameter outside layers belongs to (`model.embed_tokens.weight` -> embed_tokens)."""
    number = layer_number(name)
    return str(number) if number is not None else (name.rpartition(".")[0].rpartition(".")[2] or name)


def _sample(shard: Shard) -> Tensor:
    every = max(1, shard.shape.numel() // SAMPLE) | 1  # odd, so that it does not keep to some columns of a matrix
    return shard.data[-shard.start % every :: every]


def _square(after: Tensor, before: Tensor) -> Tensor:
    """The sum of squared changes, and their number: float32 (2,)."""
    change = after.float() - before.float()
    return torch.stack([change.square().sum(), change.new_tensor(len(change))])
