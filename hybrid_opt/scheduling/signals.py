"""Signals: what is known of the run so far when the next step is planned. Next: `schedule.py`."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Signals:
    """Totals since the start of the run, and the latest loss."""

    step: int = 0
    """Steps taken."""
    tokens: int = 0
    """Tokens that forward passes of the estimators have processed."""
    forwards: int = 0
    """Forward passes over a batch."""
    backwards: int = 0
    """Backward passes over a batch."""
    seconds: float = 0.0
    """Time spent in steps."""
    loss: float | None = None
    """Training loss of the latest step."""

    def updated(self, *, tokens: int, forwards: int, backwards: int, seconds: float, loss: float) -> "Signals":
        """The signals after one more step."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            forwards=self.forwards + forwards,
            backwards=self.backwards + backwards,
            seconds=self.seconds + seconds,
            loss=loss,
        )
