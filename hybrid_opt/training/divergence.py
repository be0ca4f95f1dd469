"""Runs that diverge: they stop, or go on from their best weights with lower learning rates. Next: `trainer.py`.

One idea: a roll back puts back everything that decides how good the weights are, and nothing that counts. Steps, schedule and data go
on, so the same batch and noise are not met again at the same weights, no step is taken twice, and a budget that is spent stays spent.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hybrid_opt.config.divergence import Divergence
from hybrid_opt.errors import DivergedError, UserError
from hybrid_opt.recovery.checkpoint import checkpoints, save_checkpoint, step_of
from hybrid_opt.recovery.keeping import Keeper
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer, StepReport


@dataclass
class Watch:
    """What the losses of a run say; it touches nothing."""

    config: Divergence
    best: float | None = None
    """Lowest validation loss."""
    worse: int = 0
    """Evaluations in a row, up to the latest, above it."""
    roll_backs: int = 0

    def sees_step(self, loss: float | None) -> str:
        """Why a step's training loss is divergence; empty if it is not."""
        return "" if loss is None else self._too_high("training", loss)

    def sees_evaluation(self, loss: float) -> tuple[bool, str]:
        """Whether it is the best so far, and why it is divergence; empty if it is not."""
        if reason := self._too_high("validation", loss):
            return False, reason
        if self.best is None or loss < self.best:
            self.best, self.worse = loss, 0
            return True, ""
        self.worse = self.worse + 1 if loss > self.best else 0
        if self.config.rises_for is None or self.worse < self.config.rises_for:
            return False, ""
        return False, (
            f"the validation loss, {loss:.4g}, has been above its best, {self.best:.4g}, in {self.worse} "
            f"evaluation{'s in a row' if self.worse > 1 else ''} (training.divergence.rises_for)"
        )

    def goes_back(self) -> bool:
        """Whether a divergence is answered by another roll back, which is counted."""
        if self.config.action == "stop" or self.roll_backs >= self.config.most:
            return False
        self.roll_backs, self.worse = self.roll_backs + 1, 0
        return True

    def _too_high(self, whose: str, loss: float) -> str:
        if not math.isfinite(loss):
            return f"the {whose} loss is {loss}"
        limit = self.config.loss_above
        is_above = limit is not None and loss > limit
        return (
            f"the {whose} loss, {loss:.4g}, is above {limit:.4g} (training.divergence.loss_above)" if is_above else ""
        )


class Guard:
    """Keeps the best weights of a run and goes back to them; without a configuration it does nothing. All ranks together.

    Args:
        keeper: keeps the best weights, beside the run's checkpoints; None: there is no folder.
        say: tells the user a line.
        evaluates: whether there are evaluations along the way.
    """

    def __init__(
        self,
        config: Divergence | None,
        optimizer: HybridOptimizer,
        keeper: Keeper | None,
        say: Callable[[str], None],
        *,
        evaluates: bool,
    ) -> None:
        if config and config.action == "roll_back" and keeper is None:
            raise UserError("divergence: roll_back keeps the best weights in the output folder; pass output=...")
        if config and config.needs_evaluations and not evaluates:
            raise UserError(
                "divergence: rises_for and roll_back go by evaluations along the way; pass validation=... and evaluate_every=..."
            )
        self.watch = Watch(config) if config else None
        self.optimizer, self.keeper, self.say = optimizer, keeper, say
        self.folder = keeper.folder.checkpoints / "best" if keeper else None
        self.rolled_back: dict[str, Any] | None = None
        """The roll back that no line of the metrics has told of yet."""

    @property
    def roll_backs(self) -> int:
        """How many there were."""
        return self.watch.roll_backs if self.watch else 0

    def begin(self, evaluate: Callable[[], Mapping[str, float]]) -> None:
        """See the loss before the first step, if evaluations count.

        Raises:
            UserError: it is above the limit already.
        """
        if self.watch and self.watch.config.needs_evaluations:
            _, reason = self.watch.sees_evaluation(evaluate()["loss"])
            if reason:
                raise UserError(f"before the first step {reason}; raise the limit, or look at the model and the data")
            self._keep()

    def evaluated(self, loss: float) -> None:
        """See the loss of an evaluation: keep the weights if they are the best, roll back if the run diverges.

        Raises:
            DivergedError: the run is to stop.
        """
        if self.watch:
            is_best, reason = self.watch.sees_evaluation(loss)
            if is_best:
                self._keep()
            self._act_on(reason)

    def stepped(self, loss: float | None) -> None:
        """See the training loss of a step; as `evaluated`."""
        if self.watch:
            self._act_on(self.watch.sees_step(loss))

    def taken(self, take: Callable[[], StepReport]) -> StepReport | None:
        """Take a step; None if it found something that is not finite, and the run goes on with the next step from the best weights."""
        try:
            return take()
        except DivergedError as error:
            self._roll_back(error)
        self.optimizer.skip_step()
        return None

    def told(self) -> dict[str, Any]:
        """For the metrics of the first step after a roll back: where it went, why, and what learning rates are multiplied by."""
        rolled_back, self.rolled_back = self.rolled_back, None
        return {"rolled_back": rolled_back} if rolled_back else {}

    def state_dict(self) -> dict[str, Any]:
        """What has been seen and not yet told, in plain values."""
        seen = {name: value for name, value in asdict(self.watch).items() if name != "config"} if self.watch else {}
        return {"seen": seen, "rolled_back": self.rolled_back}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.rolled_back = state["rolled_back"]
        if self.watch:
            self.watch = Watch(self.watch.config, **state["seen"])

    def _keep(self) -> None:
        if self.watch.config.action == "roll_back":
            save_checkpoint(self.folder, self.optimizer.signals.step, self.optimizer.engine.ranks, self.keeper.state)

    def _act_on(self, reason: str) -> None:
        if reason:
            self._roll_back(DivergedError(f"step {self.optimizer.signals.step}: {reason}; lower the learning rates"))

    def _roll_back(self, error: DivergedError) -> None:
        """Go back to the best weights.

        Raises:
            DivergedError: the error itself, where the run is to stop.
        """
        best = next(iter(checkpoints(self.folder)), None) if self.watch and self.folder else None
        if best is None or not self.watch.goes_back():
            again = f" (after {self.roll_backs} roll back{'s' * (self.roll_backs > 1)})" if self.roll_backs else ""
            raise DivergedError(f"{error}{again}")
        optimizer, watch = self.optimizer, self.watch
        self.keeper.go_back(best)
        optimizer.rate_factor *= watch.config.factor
        step = step_of(best)
        self.rolled_back = {"to": step, "because": str(error), "rate_factor": optimizer.rate_factor}
        self.say(
            f"rolled back to the weights after step {step}, learning rates times {optimizer.rate_factor:.4g} from now on (roll back "
            f"{watch.roll_backs} of {watch.config.most}), because at {error}"
        )
