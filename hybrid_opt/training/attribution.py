"""What each estimator contributed to the fall of the loss. Next: `../run_files/summary.py`.

One idea: the loss on a fixed set of probe rows is measured whenever other estimators take over, and the change since the
last measurement is credited to those who acted in between. Losses of training batches would not do: they differ more
from batch to batch than a turn changes them. Where the run's objective is a reward, a fall of the loss is a rise of the reward,
whatever those who acted minimised themselves.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from hybrid_opt.scheduling.signals import Signals, restored


class Attribution:
    """Credits falls of the probe loss to whoever acted alone; what several did together stays shared.

    Args:
        probe: measures the probe loss; None: nothing is measured.
        spent: totals of the run so far.
    """

    def __init__(self, probe: Callable[[], float] | None, spent: Callable[[], Signals]) -> None:
        self.probe = probe
        self.spent = spent
        self.acting: tuple[str, ...] | None = None
        self.loss: float | None = None
        self.decrease: dict[str, float] = {}
        self.began = Signals()
        """The totals when the turn began."""
        self.measured: dict[str, float] = {}
        """What the latest turn has brought for what it took, not yet told."""

    def before_step(self, acting: tuple[str, ...]) -> None:
        """Measure if other estimators than before are about to act."""
        if self.probe is not None and acting != self.acting:
            self._settle()
            self.acting = acting

    def finish(self) -> None:
        """Credit the last turn."""
        if self.probe is not None and self.acting is not None:
            self._settle()
            self.acting = None

    def _settle(self) -> None:
        loss, spent = self.probe(), self.spent()
        if self.acting is not None:
            who = "+".join(self.acting)
            self.decrease[who] = self.decrease.get(who, 0.0) + self.loss - loss
            for amount in ("second", "forward_equivalent"):
                taken = spent.value(f"{amount}s", self.began)
                self.measured |= {f"{who}.loss_decrease_per_{amount}": (self.loss - loss) / taken} if taken else {}
        self.loss, self.began = loss, spent

    def told(self) -> dict[str, float]:
        """Signals of the turn that has ended since the latest call."""
        measured, self.measured = self.measured, {}
        return measured

    def state_dict(self) -> dict[str, Any]:
        """The credits and the turn under way, in plain values."""
        return {
            "acting": None if self.acting is None else list(self.acting),
            "loss": self.loss,
            "decrease": [[who, amount] for who, amount in self.decrease.items()],
            "began": asdict(self.began),
            "measured": self.measured,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.acting = None if state["acting"] is None else tuple(state["acting"])
        self.loss = state["loss"]
        self.decrease = dict(state["decrease"])
        self.began, self.measured = restored(state["began"]), state["measured"]
