"""The schedule that gives each block of steps to the estimator that pays most. Next: `learning_rate.py`.

One idea: whether an estimator pays is measured on the same rows before and after its block, in the currency the user cares for; training
losses of different estimators cannot be compared.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from hybrid_opt.config.adaptive import Adaptive
from hybrid_opt.errors import UserError
from hybrid_opt.scheduling.signals import Signals, restored


@dataclass
class Arm:
    """What is known of an estimator; both discounted, see `config.adaptive.Adaptive`."""

    weight: float = 0.0
    """How many blocks it has had."""
    total: float = 0.0
    """Sum of their rates."""

    @property
    def rate(self) -> float:
        """Mean fall of the probe loss for what it took."""
        return self.total / self.weight


class AdaptiveSchedule:
    """Blocks of single estimators, chosen by discounted UCB."""

    phase: int | None = None

    def __init__(self, config: Adaptive) -> None:
        self.config = config
        self.arms = {name: Arm() for name in config.estimators}
        self.chosen: str | None = None
        self.start = Signals()
        """The signals when the block began."""
        self.start_loss = math.nan
        """The probe loss then."""
        self.planned = -1
        """The step of the latest plan."""
        self.reason: str | None = None
        self.account: dict[str, dict[str, float]] | None = None
        self.goes_back: int | None = None
        """The step at whose weights the latest plan wants to go on, as the block that began there has done harm."""

    @property
    def mark(self) -> int | None:
        """See `Schedule.mark`."""
        return None if self.config.roll_back_above is None or self.chosen is None else self.start.step

    def asks(self, signals: Signals) -> bool:
        """Whether the probe loss must be told before the next plan."""
        return self.chosen is None or (
            signals.step > self.planned and signals.value("forward_equivalents", self.start) >= self.config.block
        )

    def plan(self, step: int, signals: Signals) -> dict[str, float]:
        """See `Schedule.plan`.

        Raises:
            UserError: a block is over, and nobody has told the probe loss, or the device does not report what `per` asks for.
        """
        if step > self.planned:
            self.reason, self.account, self.goes_back = None, None, None
            if self.asks(signals):
                self._begin_block(signals)
            self.planned = step
        return {self.chosen: 1.0}

    def _begin_block(self, signals: Signals) -> None:
        loss = signals.measured.get("probe_loss")
        if loss is None:
            raise UserError(
                f"schedule: adaptive goes by the loss on probe rows, which nobody has told before step {signals.step}; set "
                "training.probe_rows in a run file, pass probe=... to Trainer or probe_dataset=... to HybridTrainer, or in a loop of your own "
                "tell({'probe_loss': ...}) whenever asks() says so"
            )
        last = "" if self.chosen is None else f"; {self._credit(loss, signals)}"
        self.start, self.start_loss = signals, self.start_loss if self.goes_back is not None else loss
        indices = {name: self._index(arm) for name, arm in self.arms.items()}
        self.chosen = max(indices, key=indices.get)  # the first of equals
        self.account = {n: {"rate": arm.rate, "index": indices[n]} for n, arm in self.arms.items() if arm.weight}
        untried = self.arms[self.chosen].weight == 0
        why = "which has had no block yet" if untried else f"with the highest index, {indices[self.chosen]:.3g}"
        self.reason = f"{self.chosen}, {why}{last}"

    def _credit(self, loss: float, signals: Signals) -> str:
        """Judge the block that has ended; in words."""
        config, spent = self.config, signals.value(f"{self.config.per}s", self.start)
        if not spent:
            raise UserError(
                f"schedule.per: {config.per} cannot be used here, because this device does not report its energy; write per: second"
            )
        loss = loss if math.isfinite(loss) else self.start_loss + abs(self.start_loss) + 1
        rate = (self.start_loss - loss) / spent
        for arm in self.arms.values():
            arm.weight, arm.total = config.discount * arm.weight, config.discount * arm.total
        arm = self.arms[self.chosen]
        arm.weight, arm.total = arm.weight + 1, arm.total + rate
        told = f"{self.chosen} brought {rate:.3g} per {config.per.replace('_', ' ')}"
        if config.roll_back_above is not None and loss > self.start_loss + config.roll_back_above:
            self.goes_back = self.start.step
            told += f" and is undone: the probe loss rose from {self.start_loss:.4g} to {loss:.4g}"
        return told

    def _index(self, arm: Arm) -> float:
        if not arm.weight:
            return math.inf
        tried = [other for other in self.arms.values() if other.weight]
        scale, total = max(abs(other.rate) for other in tried), sum(other.weight for other in tried)
        return arm.rate + self.config.exploration * scale * math.sqrt(math.log(max(math.e, total)) / arm.weight)

    def state_dict(self) -> dict[str, Any]:
        """What has been measured, and the block under way."""
        return {
            "arms": [[name, arm.weight, arm.total] for name, arm in self.arms.items()],
            "chosen": self.chosen,
            "start": asdict(self.start),
            "start_loss": self.start_loss,
            "planned": self.planned,
            "reason": self.reason,
            "account": self.account,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.arms = {name: Arm(weight, total) for name, weight, total in state["arms"]}
        self.chosen, self.start, self.start_loss = state["chosen"], restored(state["start"]), state["start_loss"]
        self.planned, self.reason, self.account = state["planned"], state["reason"], state["account"]
        self.goes_back = None
