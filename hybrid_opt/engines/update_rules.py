"""Update rules: an estimate for a shard becomes a change of its weights. Next: `rounding.py`, then `local.py`.

One idea: the state of a rule is held per shard in float32, so a rule works the same however weights are sharded, and
reads one shard's estimate at a time, so the whole estimate is never in memory.
"""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hybrid_opt.config.steps import AdamRule, MomentumRule, SgdRule
from hybrid_opt.engines.contract import Shard

if TYPE_CHECKING:
    from hybrid_opt.estimators.contract import Estimate


class UpdateRule(Protocol):
    """Moves weights along an estimate."""

    def update(self, shard: Shard, estimate: "Estimate", weight: float, learning_rate: float) -> None:
        """Change the shard's weights in place, given g = weight * estimate; the weights are float32."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The rule's memory, by parameter name and quantity."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        ...


class Sgd:
    """`w <- w - learning_rate * g`."""

    def update(self, shard: Shard, estimate: "Estimate", weight: float, learning_rate: float) -> None:
        """Take a step; the estimate is added to the weights as it is made, so it takes no memory of its own."""
        estimate.add_to(shard.data, shard, -learning_rate * weight)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing is remembered."""


class Momentum:
    """`m <- beta m + g; w <- w - learning_rate * m`."""

    def __init__(self, beta: float):
        self.beta = beta
        self.running_sum: dict[str, Tensor] = {}

    def update(self, shard: Shard, estimate: "Estimate", weight: float, learning_rate: float) -> None:
        """Take a step."""
        m = self.running_sum.get(shard.name)
        m = torch.zeros_like(shard.data) if m is None else m.to(shard.data.device)  # a loaded one lies in main memory
        self.running_sum[shard.name] = m
        estimate.add_to(m.mul_(self.beta), shard, weight)
        shard.data.add_(m, alpha=-learning_rate)

    def state_dict(self) -> dict[str, Tensor]:
        """The running sums by parameter."""
        return dict(self.running_sum)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        self.running_sum = dict(state)


class Adam:
    """Adam with bias correction (Kingma & Ba, arXiv 1412.6980)."""

    def __init__(self, beta1: float, beta2: float, epsilon: float):
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.moments: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def update(self, shard: Shard, estimate: "Estimate", weight: float, learning_rate: float) -> None:
        """Take a step."""
        name, gradient = shard.name, torch.zeros_like(shard.data)
        estimate.add_to(gradient, shard, weight)  # what `read` gives may be the estimate's own memory
        if name not in self.moments:
            self.moments[name] = (torch.zeros_like(gradient), torch.zeros_like(gradient), torch.zeros((), device="cpu"))
        first, second, count = self.moments[name]
        first, second = first.to(gradient.device), second.to(gradient.device)  # loaded ones lie in main memory
        self.moments[name] = (first, second, count)
        count += 1
        first.lerp_(gradient, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        root = (second / (1 - self.beta2 ** count.item())).sqrt_().add_(self.epsilon)
        shard.data.add_(root.reciprocal_().mul_(first), alpha=-learning_rate / (1 - self.beta1 ** count.item()))

    def state_dict(self) -> dict[str, Tensor]:
        """First moment, second moment and number of steps by parameter."""
        return {
            f"{name}/{quantity}": tensor
            for name, moments in self.moments.items()
            for quantity, tensor in zip(("first", "second", "steps"), moments, strict=True)
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        names = dict.fromkeys(key.rpartition("/")[0] for key in state)
        self.moments = {n: (state[f"{n}/first"], state[f"{n}/second"], state[f"{n}/steps"]) for n in names}


def build_rule(config: SgdRule | MomentumRule | AdamRule) -> UpdateRule:
    """The rule that a configuration describes, without any memory yet."""
    match config:
        case SgdRule():
            return Sgd()
        case MomentumRule():
            return Momentum(config.beta)
        case AdamRule():
            return Adam(config.beta1, config.beta2, config.epsilon)
