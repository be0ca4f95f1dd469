"""What a run keeps of itself as it goes, and how it comes back from there. Next: `replaying.py`.

One idea: a step that the ledger holds can be taken again for nothing, so a checkpoint needs weights only where it cannot reach back to
others.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hybrid_opt.engines.inspection import weights_digest
from hybrid_opt.errors import UserError
from hybrid_opt.recovery.checkpoint import (
    base_of,
    checkpoints,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    set_aside,
    step_of,
    verified,
)
from hybrid_opt.recovery.ledger import Ledger, read_steps
from hybrid_opt.recovery.records import description_of

if TYPE_CHECKING:
    from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
    from hybrid_opt.training.run_folder import RunFolder
    from hybrid_opt.training.step_report import StepReport


@dataclass(frozen=True)
class Keeping:
    """How much is kept; see `config.run.Training`."""

    keep_checkpoints: int = 2
    snapshots: Literal["checkpoint", "switch"] | int = "checkpoint"
    replay_at_most: int = 100


class Keeper:
    """Writes a run's ledger and checkpoints, and loads them. All ranks call its methods together.

    Args:
        folder: the run's.
        optimizer: what is kept.
        config: the run's configuration, from which its model at the start can be had again; None: a script made it.
        whole: whether every checkpoint is to have the weights.
        say: shows a line to the user.
    """

    def __init__(
        self,
        folder: "RunFolder",
        optimizer: "HybridOptimizer",
        keeping: Keeping,
        *,
        config: Mapping[str, Any] | None,
        whole: bool,
        say: Callable[[str], None],
    ):
        self.folder, self.optimizer, self.keeping, self.whole, self.say = folder, optimizer, keeping, whole, say
        self.config, self.ranks = config, optimizer.engine.ranks
        self.ledger = Ledger(
            folder.ledger, description_of(optimizer.engine, config is not None), writes=self.ranks.rank == 0
        )
        self.base = None if config is None else 0
        """Step of the latest snapshot; 0: the model at the start."""
        self.lost = 0
        """Steps since then that the ledger does not hold."""
        self.latest_is_lost = False
        self.next_step = 0

    def begin(self) -> None:
        """A new run starts."""
        self.ledger.begin()

    def stepped(self, report: "StepReport") -> None:
        """A step has been taken; after a roll back its number is not the next."""
        self.latest_is_lost = report.record is None or report.step != self.next_step
        self.next_step = report.step + 1
        self.lost += self.latest_is_lost
        if report.record is not None:
            self.ledger.append(report.record.document(self.optimizer.engine))

    def is_due(self, acting: Collection[str]) -> bool:
        """Whether a snapshot must be made now because of steps that the ledger does not hold.

        Args:
            acting: who acts in the next step.
        """
        if self.keeping.snapshots == "checkpoint" or not self.lost:
            return False
        if self.keeping.snapshots == "switch":
            estimators = self.optimizer.config.estimators
            return self.latest_is_lost and all(estimators[name].draws_noise for name in acting)
        return self.lost >= self.keeping.snapshots

    def save(self, write: Callable[[Path, bool], Mapping[str, Any]]) -> Path:
        """Save a checkpoint.

        Args:
            write: see `save_checkpoint`; also told whether weights belong to the state.
        """
        step = self.optimizer.signals.step
        whole = not self._is_reached(step)

        def state(place: Path) -> dict[str, Any]:
            kept = write(place, whole)
            return {**kept, **({} if whole else {"weights": weights_digest(self.optimizer.engine)})}

        made = save_checkpoint(
            self.folder.checkpoints,
            step,
            self.ranks,
            state,
            base=None if whole else self.base,
            keep=self.keeping.keep_checkpoints,
        )
        if whole:
            self.base, self.lost = step, 0
        return made

    def load(self) -> dict[str, Any]:
        """Bring the optimizer to the latest checkpoint that is whole, and give that checkpoint's state.

        Raises:
            UserError: there is none, or it is of other ranks, or of another model.
        """
        checkpoint = self._latest_whole()
        step, base = step_of(checkpoint), base_of(checkpoint)
        state = load_checkpoint(checkpoint, self.ranks.rank)
        self._refuse_other_layout(checkpoint, state["optimizer"]["layout"])
        start = 0 if base is None else step_of(base)
        if base is not None:
            found = state if base == checkpoint else load_checkpoint(base, self.ranks.rank)
            self.optimizer.load_state_dict(found["optimizer"], base / "engine")
        if base != checkpoint:
            self._replay(start, step)
            self._refuse_other_weights(checkpoint, state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.base, self.lost, self.latest_is_lost, self.next_step = start, 0, False, step
        self.ranks.wait()
        self.ledger.go_on_at(step)
        return state

    def finish(self) -> None:
        """The run is over: nothing is needed to go on from, and snapshots only if they were asked for."""
        remove_checkpoints(self.folder.checkpoints, light_only=self.keeping.snapshots != "checkpoint")

    def _is_reached(self, step: int) -> bool:
        return (
            not self.whole
            and self.base is not None
            and step - self.base <= self.keeping.replay_at_most
            and self.ledger.reaches(self.base, step)
        )

    def _latest_whole(self) -> Path:
        """The latest checkpoint that can be used, as rank 0 sees it."""
        found = checkpoints(self.folder.checkpoints)
        chosen, problem = len(found), ""
        for number, checkpoint in enumerate(found if self.ranks.rank == 0 else ()):
            try:
                self._verify(checkpoint)
                chosen = number
                break
            except UserError as error:
                problem = problem or str(error)
                before = (
                    f"going back to {found[number + 1].name}" if number + 1 < len(found) else "and there is none before"
                )
                self.say(f"{checkpoint.name} is damaged ({error}), {before}")
        chosen = self.ranks.least(chosen if self.ranks.rank == 0 else len(found))
        if chosen == len(found):
            raise UserError(
                f"output: {self.folder.path} has no checkpoint that is whole ({problem}); start anew with --overwrite, or bring back a copy"
            )
        for damaged in found[:chosen] if self.ranks.rank == 0 else ():
            set_aside(damaged)
        return found[chosen]

    def _verify(self, checkpoint: Path) -> None:
        verified(checkpoint)
        base = base_of(checkpoint)
        if base == checkpoint:
            return
        if base is not None:
            verified(base)
        for _ in self._steps(0 if base is None else step_of(base), step_of(checkpoint)):
            pass

    def _steps(self, first: int, end: int):
        return read_steps(self.ledger.path, first, end, self.ledger.model)

    def _replay(self, first: int, end: int) -> None:
        if end > first:
            self.say(f"taking steps {first} to {end - 1} again from the ledger ...")
        for document in self._steps(first, end):
            self.optimizer.replay(document)

    def _refuse_other_weights(self, checkpoint: Path, digest: str) -> None:
        if self.ranks.any(digest != weights_digest(self.optimizer.engine)):
            raise UserError(
                f"output: {self.folder.path}: the ledger does not lead to the weights of {checkpoint.name}, so the kind of device, the "
                "number of threads or a library is another than then; use the same, or start anew with --overwrite"
            )

    def _refuse_other_layout(self, checkpoint: Path, saved: dict[str, int]) -> None:
        if saved != (own := self.optimizer.engine.layout()):
            model = checkpoint / "model"
            random = " model.config=null" if (self.config or {}).get("model", {}).get("config") else ""
            hint = f"model.name={model}{random} output=..." if model.is_dir() else "engine.consolidate: true writes it"
            raise UserError(
                f"output: {self.folder.path}: {checkpoint.name} was saved by {_described(saved)}, and this run has {_described(own)}; "
                f"resume with the same, or start a new run from the whole model ({hint})"
            )


def _described(layout: dict[str, int]) -> str:
    ranks = f"{layout['ranks']} rank{'s' * (layout['ranks'] > 1)}"
    return f"{ranks} under ZeRO-{layout['zero_stage']}" if layout["zero_stage"] else f"{ranks} without ZeRO"
