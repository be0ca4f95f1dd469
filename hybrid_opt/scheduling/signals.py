"""Signals: what is known of the run so far when the next step is planned; `../config/triggers.py` has their names. Next: `schedule.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hybrid_opt.config.triggers import COUNTED, SLOPE_STEPS


@dataclass(frozen=True)
class Signals:
    """Totals since the start of the run, the latest losses, and what was measured since the latest plan."""

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
    joules: float = 0.0
    """Energy spent in them, as far as the device reports it."""
    loss: float | None = None
    """Training loss of the latest step; None before the first, and after one that evaluated nothing."""
    lost_steps: int = 0
    """How many steps in a row, up to the latest, were skipped because too many members' losses were not finite."""
    losses: tuple[tuple[int, float], ...] = ()
    """Steps and training losses of the latest `SLOPE_STEPS` steps that had one."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """By the names of `config.triggers`, what the latest step has measured, and what was measured after it."""

    def updated(
        self,
        *,
        loss: float | None,
        is_lost: bool = False,
        measured: Mapping[str, float] | None = None,
        **amounts: float,
    ) -> "Signals":
        """The signals after one more step, which took these amounts of tokens, forwards, ...

        Args:
            is_lost: whether it was skipped because losses were not finite.
            measured: what it measured, by name.
        """
        totals = {name: getattr(self, name) + amount for name, amount in amounts.items()}
        losses = self.losses if loss is None else (*self.losses, (self.step, loss))[-SLOPE_STEPS:]
        lost_steps = (self.lost_steps + 1) * is_lost
        own = {"measured": dict(measured or {}), "losses": losses, "lost_steps": lost_steps}
        return replace(self, step=self.step + 1, loss=loss, **own, **totals)

    def told(self, measured: Mapping[str, float]) -> "Signals":
        """The signals with what was measured after the latest step."""
        return replace(self, measured={**self.measured, **measured})

    def value(self, name: str, since: "Signals") -> float | None:
        """A signal by its name, None if nothing has measured it since the latest plan.

        Args:
            since: the signals from which totals, and the losses of the slope, count.
        """
        if name == "steps":
            return self.step - since.step
        if name in COUNTED:
            return getattr(self, name) - getattr(since, name)
        if name == "loss_slope":
            return self.loss_slope(since.step)
        return self.loss if name == "loss" else self.measured.get(name)

    def loss_slope(self, first: int = 0) -> float | None:
        """Change of the training loss per step, `cov(t, L_t) / var(t)` over the latest `SLOPE_STEPS` steps that had a loss.

        None if there were fewer from the step `first` on, or if the latest had none.
        """
        losses = [(step, loss) for step, loss in self.losses if step >= first]
        if len(losses) < SLOPE_STEPS or self.loss is None:
            return None
        mean_step = sum(step for step, _ in losses) / len(losses)
        mean_loss = sum(loss for _, loss in losses) / len(losses)
        variance = sum((step - mean_step) ** 2 for step, _ in losses)
        return sum((step - mean_step) * (loss - mean_loss) for step, loss in losses) / variance


def restored(state: Mapping) -> Signals:
    """Signals from what `dataclasses.asdict` gave, perhaps through JSON."""
    return Signals(**{**state, "losses": tuple((step, loss) for step, loss in state["losses"])})
