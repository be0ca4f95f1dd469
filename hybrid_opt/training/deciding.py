"""What a schedule is told before a step, and what it wants done about the weights. Next: `attribution.py`.

One idea: the loss on the probe rows is measured once a step whoever asks for it, so who is credited and what is decided agree.
"""

from collections.abc import Callable

from hybrid_opt.errors import UserError
from hybrid_opt.recovery.checkpoint import place_of
from hybrid_opt.recovery.keeping import Keeper
from hybrid_opt.training.attribution import Attribution
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer


class Decisions:
    """Lets the schedule plan each step. All ranks together.

    Args:
        probe: measures the loss on the probe rows; None: there are none.
        keeper: keeps weights to go back to; None: there is no folder.
        say: tells the user a line.

    Raises:
        UserError: the schedule goes back to weights, and there is no folder to keep them in.
    """

    def __init__(
        self,
        optimizer: HybridOptimizer,
        probe: Callable[[], float] | None,
        keeper: Keeper | None,
        say: Callable[[str], None],
    ):
        if getattr(optimizer.config.schedule, "roll_back_above", None) and not keeper:
            raise UserError("schedule.roll_back_above: it goes back to weights in the output folder; pass output=...")
        self.optimizer, self.probe, self.keeper, self.say = optimizer, probe, keeper, say
        self.probed: tuple[int, float] | None = None
        """Step and loss of the latest measurement."""
        self.attribution = Attribution(self.probe_loss if probe else None, lambda: self.optimizer.signals)

    def probe_loss(self) -> float:
        """The loss on the probe rows at the weights as they are."""
        step = self.optimizer.signals.step
        if self.probed is None or self.probed[0] != step:
            self.probed = (step, self.probe())
        return self.probed[1]

    def plan(self) -> None:
        """Let the schedule plan the next step."""
        optimizer, schedule = self.optimizer, self.optimizer.schedule
        if optimizer.asks() and self.probe:
            optimizer.tell({"probe_loss": self.probe_loss()})
        optimizer.acting()
        if schedule.goes_back is not None:
            self._go_back(schedule.goes_back)
            schedule.goes_back = None
        if schedule.mark == optimizer.signals.step and self.keeper.marked != schedule.mark:
            self.keeper.mark()

    def _go_back(self, step: int) -> None:
        self.keeper.go_back(place_of(self.keeper.folder.checkpoints, step))
        self.probed = None
        self.say(f"step {self.optimizer.signals.step}: {self.optimizer.schedule.reason}")
