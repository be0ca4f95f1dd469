"""Signals: what is known of the run so far when the next step is planned. Next: `schedule.py`."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Signals:
    """Totals since the start of the run, and the latest step's loss."""

    step: int = 0
    """Steps taken."""
    tokens: int = 0
    """Tokens that forward passes of the estimators have processed."""
    forwards: int = 0
    """Forward passes over a batch."""
    backwards: int = 0
    """Backward passes over a batch."""
    forward_equivalents: float = 0.0
    """Computing so far, in forward passes over a whole batch (see `Cost`)."""
    seconds: float = 0.0
    """Time spent in steps."""
    loss: float | None = None
    """Training loss of the latest step; None before the first, and after one that evaluated nothing."""
    lost_steps: int = 0
    """How many steps in a row, up to the latest, were skipped because too many members' losses were not finite."""

    def updated(self, *, loss: float | None, is_lost: bool = False, **amounts: float) -> "Signals":
        """The signals after one more step, which took these amounts of tokens, forwards, ...

        Args:
            is_lost: whether it was skipped because losses were not finite.
        """
        totals = {name: getattr(self, name) + amount for name, amount in amounts.items()}
        return replace(self, step=self.step + 1, loss=loss, lost_steps=(self.lost_steps + 1) * is_lost, **totals)
