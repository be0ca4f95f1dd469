"""What a schedule and a memory budget are told around a step, and what they want done. Next: `attribution.py`, `memory_budget.py`.

One idea: the loss on the probe rows is measured once a step whoever asks for it, so who is credited and what is decided agree.
"""

from collections.abc import Callable, Collection, Mapping

from hybrid_opt.errors import UserError
from hybrid_opt.machine.memory import free_memory_bytes
from hybrid_opt.objectives.batches import Batches
from hybrid_opt.recovery.checkpoint import place_of
from hybrid_opt.recovery.keeping import Keeper
from hybrid_opt.training.attribution import Attribution
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from hybrid_opt.training.step_report import StepReport


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
    ) -> None:
        if getattr(optimizer.config.schedule, "roll_back_above", None) and not keeper:
            raise UserError("schedule.roll_back_above: it goes back to weights in the output folder; pass output=...")
        self.optimizer, self.probe, self.keeper, self.say = optimizer, probe, keeper, say
        self.probed: tuple[int, float] | None = None
        """Step and loss of the latest measurement."""
        self.attribution = Attribution(self.probe_loss if probe else None, lambda: self.optimizer.signals)

    def begin(self, batches: Mapping[str | None, Batches]) -> None:
        """Before the first step of a run: fit it into its memory, with the largest batches where these are known; else the first step does
        so with its own.

        Args:
            batches: the run's (None), and those of estimators with their own.
        """
        if self.optimizer.memory and all(hasattr(source, "largest") for source in batches.values()):
            self.say("trying what fits into the memory budget ...")
            largest = {name: source.largest() for name, source in batches.items()}
            self.optimizer.fit_memory(largest.pop(None), largest)

    def stepped(self, report: StepReport, peak: int, acting: Collection[str]) -> dict[str, float]:
        """Tell the schedule what else a step has shown, on all ranks the same, of memory the worst of theirs.

        Args:
            peak: most memory used during the step, in bytes.
            acting: who acted.

        Returns:
            What of it, and of the signals, no other part of the step's line has.
        """
        optimizer = self.optimizer
        if report.memory:
            self.say(f"step {report.step}: {report.memory}")
        if optimizer.memory:
            optimizer.memory.observe(peak, acting)
        ranks, device = optimizer.engine.ranks, optimizer.engine.device
        peak, taken = ranks.most(peak, -free_memory_bytes(device))
        told = {"free_memory_bytes": int(-taken), **self.attribution.told()}
        optimizer.tell({"peak_memory_bytes": peak, **told})
        slope = optimizer.signals.loss_slope()
        return {**told, **({} if slope is None else {"loss_slope": slope})}

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
