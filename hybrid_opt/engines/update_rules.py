"""Update rules: an estimate for a shard becomes a change of its weights. Next: `local.py`.

One idea: the state of a rule is held per shard in float32, so a rule works the same however weights are sharded, and
reads one shard's estimate at a time, so the whole estimate is never in memory.
"""

from typing import Protocol

import torch
from torch import Tensor

from hybrid_opt.config.schedule import AdamRule, MomentumRule, SgdRule


class UpdateRule(Protocol):
    """Moves weights along an estimate."""

    def update(self, name: str, weights: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """Change `weights` (numel,) in place, given the estimate `gradient` (numel,) float32 for the same shard."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The rule's memory, by parameter name and quantity."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        ...


class Sgd:
    """`w <- w - learning_rate * g`."""

    def update(self, name: str, weights: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """Take a step."""
        subtract(weights, gradient, learning_rate)

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

    def update(self, name: str, weights: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """Take a step."""
        if name not in self.running_sum:
            self.running_sum[name] = torch.zeros_like(gradient)
        self.running_sum[name] = self.running_sum[name].to(gradient.device)  # a loaded one lies in main memory
        m = self.running_sum[name].mul_(self.beta).add_(gradient)
        subtract(weights, m, learning_rate)

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

    def update(self, name: str, weights: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """Take a step."""
        if name not in self.moments:
            self.moments[name] = (torch.zeros_like(gradient), torch.zeros_like(gradient), torch.zeros((), device="cpu"))
        first, second, count = self.moments[name]
        first, second = first.to(gradient.device), second.to(gradient.device)  # loaded ones lie in main memory
        self.moments[name] = (first, second, count)
        count += 1
        first.lerp_(gradient, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        root = (second / (1 - self.beta2 ** count.item())).sqrt_().add_(self.epsilon)
        subtract(weights, first / root, learning_rate / (1 - self.beta1 ** count.item()))

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


def subtract(weights: Tensor, direction: Tensor, learning_rate: float) -> None:
    """`weights -= learning_rate * direction`, added up in float32 and rounded once if the weights are narrower."""
    if weights.dtype == torch.float32:
        weights.add_(direction, alpha=-learning_rate)
    else:
        weights.copy_(weights.float().add_(direction, alpha=-learning_rate))


def build_rule(config: SgdRule | MomentumRule | AdamRule) -> UpdateRule:
    """The rule that a configuration describes, without any memory yet."""
    match config:
        case SgdRule():
            return Sgd()
        case MomentumRule():
            return Momentum(config.beta)
        case AdamRule():
            return Adam(config.beta1, config.beta2, config.epsilon)
