"""Update rules: an estimate for a shard becomes a change of its weights. Next: `rounding.py`, then `local.py`.

One idea: the state of a rule is held per shard in float32, so a rule works the same however weights are sharded, and
reads one shard's estimate at a time, so the whole estimate is never in memory. A change is the learning rate times something that does not
depend on it, so its length can be known, and limited, before it is made.
"""

from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from hybrid_opt.config.steps import AdamRule, MomentumRule, SgdRule
from hybrid_opt.engines.contract import Shard

if TYPE_CHECKING:
    from hybrid_opt.estimators.contract import Estimate

Treatment = Literal["decay", "reset"]
"""What becomes of a memory after a rest; see `LearningRate.state_on_switch`."""


class UpdateRule(Protocol):
    """Moves weights along an estimate."""

    def update(self, shard: Shard, estimate: "Estimate", weight: float, learning_rate: float) -> None:
        """Change the shard's weights in place, given g = weight * estimate; the weights are float32."""
        ...

    def direction(self, shard: Shard, estimate: "Estimate", weight: float) -> Tensor:
        """What `update` would take off the weights with a learning rate of 1: float32 (numel of the shard,). Changes nothing."""
        ...

    def after_rest(self, treatment: Treatment, steps: int) -> None:
        """Steps were taken without the rule: `decay` its memory as if the estimates in them had been 0, or `reset` it."""
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

    def direction(self, shard: Shard, estimate: "Estimate", weight: float) -> Tensor:
        """See `UpdateRule.direction`."""
        out = torch.zeros_like(shard.data)
        estimate.add_to(out, shard, weight)
        return out

    def after_rest(self, treatment: Treatment, steps: int) -> None:
        """Nothing is remembered."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing is remembered."""


class Momentum:
    """`m <- beta m + g; w <- w - learning_rate * m`."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.running_sum: dict[str, Tensor] = {}

    def update(self, shard: Shard, estimate: "Estimate", weight: float, learning_rate: float) -> None:
        """Take a step."""
        m = self.running_sum[shard.name] = self._sum_of(shard)
        estimate.add_to(m.mul_(self.beta), shard, weight)
        shard.data.add_(m, alpha=-learning_rate)

    def direction(self, shard: Shard, estimate: "Estimate", weight: float) -> Tensor:
        """See `UpdateRule.direction`."""
        m = self._sum_of(shard) * self.beta
        estimate.add_to(m, shard, weight)
        return m

    def after_rest(self, treatment: Treatment, steps: int) -> None:
        """`m <- beta^steps m`, or no m."""
        if treatment == "reset":
            self.running_sum = {}
        for m in self.running_sum.values():
            m.mul_(self.beta**steps)

    def _sum_of(self, shard: Shard) -> Tensor:
        if shard.name not in self.running_sum:
            return torch.zeros_like(shard.data)
        return self.running_sum[shard.name].to(shard.data.device)  # a loaded one lies in main memory

    def state_dict(self) -> dict[str, Tensor]:
        """The running sums by parameter."""
        return dict(self.running_sum)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        self.running_sum = dict(state)


class Adam:
    """Adam with bias correction (Kingma & Ba, arXiv 1412.6980)."""

    def __init__(self, beta1: float, beta2: float, epsilon: float) -> None:
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.moments: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def update(self, shard: Shard, estimate: "Estimate", weight: float, learning_rate: float) -> None:
        """Take a step."""
        moments = self.moments[shard.name] = self._moments_of(shard)
        ratio, correction = self._advanced(moments, shard, estimate, weight)
        shard.data.add_(ratio, alpha=-learning_rate / correction)

    def direction(self, shard: Shard, estimate: "Estimate", weight: float) -> Tensor:
        """See `UpdateRule.direction`."""
        moments = tuple(moment.clone() for moment in self._moments_of(shard))
        ratio, correction = self._advanced(moments, shard, estimate, weight)
        return ratio.div_(correction)

    def after_rest(self, treatment: Treatment, steps: int) -> None:
        """`first <- beta1^steps first; second <- beta2^steps second`, and so many steps more, or no moments."""
        if treatment == "reset":
            self.moments = {}
        for first, second, count in self.moments.values():
            first.mul_(self.beta1**steps)
            second.mul_(self.beta2**steps)
            count += steps

    def _moments_of(self, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
        if shard.name not in self.moments:
            return torch.zeros_like(shard.data), torch.zeros_like(shard.data), torch.zeros((), device="cpu")
        first, second, count = self.moments[shard.name]
        return first.to(shard.data.device), second.to(shard.data.device), count  # loaded ones lie in main memory

    def _advanced(
        self, moments: tuple[Tensor, Tensor, Tensor], shard: Shard, estimate: "Estimate", weight: float
    ) -> tuple[Tensor, float]:
        """Takes moments one step on; the first over the root of the second, and the first's bias correction to divide it by."""
        first, second, count = moments
        gradient = torch.zeros_like(shard.data)
        estimate.add_to(gradient, shard, weight)  # what `read` gives may be the estimate's own memory
        count += 1
        first.lerp_(gradient, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        root = (second / (1 - self.beta2 ** count.item())).sqrt_().add_(self.epsilon)
        return root.reciprocal_().mul_(first), 1 - self.beta1 ** count.item()

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
