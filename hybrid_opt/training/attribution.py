"""What each estimator contributed to the fall of the loss. Next: `summary.py`.

One idea: the loss on a fixed set of probe rows is measured whenever other estimators take over, and the change since the
last measurement is credited to those who acted in between. Losses of training batches would not do: they differ more
from batch to batch than a turn changes them. Where the run's objective is a reward, a fall of the loss is a rise of the reward,
whatever those who acted minimised themselves.
"""

from collections.abc import Callable
from typing import Any


class Attribution:
    """Credits falls of the probe loss to whoever acted alone; what several did together stays shared.

    Args:
        probe: measures the probe loss; None: nothing is measured.
    """

    def __init__(self, probe: Callable[[], float] | None):
        self.probe = probe
        self.acting: tuple[str, ...] | None = None
        self.loss: float | None = None
        self.decrease: dict[str, float] = {}

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
        loss = self.probe()
        if self.acting is not None:
            who = "+".join(self.acting)
            self.decrease[who] = self.decrease.get(who, 0.0) + self.loss - loss
        self.loss = loss

    def state_dict(self) -> dict[str, Any]:
        """The credits and the turn under way, in plain values."""
        return {
            "acting": None if self.acting is None else list(self.acting),
            "loss": self.loss,
            "decrease": [[who, amount] for who, amount in self.decrease.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.acting = None if state["acting"] is None else tuple(state["acting"])
        self.loss = state["loss"]
        self.decrease = dict(state["decrease"])
