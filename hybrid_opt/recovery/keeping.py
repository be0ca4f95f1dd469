"""What a run keeps of itself as it goes, and how it comes back from there. Next: `replaying.py`.

One idea: a step that the ledger holds can be taken again for nothing, so a checkpoint needs weights only where it cannot reach back to
others.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hybrid_opt.config.keeping import Keeping
from hybrid_opt.engines.inspection import weights_digest
from hybrid_opt.errors import DivergedError, DriftError, UserError
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
from hybrid_opt.run_files.durable import CannotWriteError

if TYPE_CHECKING:
    from hybrid_opt.run_files.run_folder import RunFolder
    from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
    from hybrid_opt.training.step_report import StepReport


class Stateful(Protocol):
    """A part of a run that remembers something from step to step."""

    def state_dict(self) -> dict[str, Any]:
        """It, as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        ...


class Keeper:
    """Writes a run's ledger and checkpoints, and loads them. All ranks call its methods together.

    Args:
        folder: the run's.
        optimizer: what is kept.
        config: the run's configuration, from which its model at the start can be had again; None: a script made it.
        consolidate: writes the whole model into a folder; then every checkpoint has the weights, and the model beside them.
        say: shows a line to the user.
    """

    def __init__(
        self,
        folder: "RunFolder",
        optimizer: "HybridOptimizer",
        keeping: Keeping,
        *,
        config: Mapping[str, Any] | None,
        consolidate: Callable[[Path], None] | None,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.optimizer, self.keeping = folder, optimizer, keeping
        self.config, self.consolidate, self.say = config, consolidate, say
        self.ranks = optimizer.engine.ranks
        self.parts: dict[str, Stateful] = {}
        """What else is kept, by name."""
        self.ledger = Ledger(
            folder.ledger, description_of(optimizer.engine, config is not None), writes=self.ranks.rank == 0
        )
        self.base = None if config is None else 0
        """Step of the latest snapshot; 0: the model at the start."""
        self.lost = 0
        """Steps since then that the ledger does not hold."""
        self.latest_is_lost = False
        self.marked: int | None = None
        """After which step the weights were marked."""

    def begin(self) -> None:
        """A new run starts."""
        self.ledger.begin()

    def stepped(self, report: "StepReport") -> None:
        """A step has been taken."""
        self.latest_is_lost = report.record is None
        self.lost += self.latest_is_lost
        if report.record is not None:
            self.ledger.append(report.record.document(self.optimizer.engine))

    def mark(self) -> None:
        """Save the weights as they are, to go back to; those of the mark before are not needed any more."""
        self.marked = self.optimizer.signals.step
        with self.folder.saving(self.ranks.rank == 0):
            self._save(self.marked, whole=True)

    def go_back(self, checkpoint: Path) -> None:
        """Put back the weights of a checkpoint that has some, what estimators remember, and who is credited for what, so that credits go
        on adding up to the fall of the loss; the run goes on with the next step.

        Raises:
            DamagedError: it is not as it was written.
        """
        verified(checkpoint)
        state = load_checkpoint(checkpoint, self.ranks.rank)
        self.optimizer.roll_back(state["optimizer"], checkpoint / "engine")
        self.parts["attribution"].load_state_dict(state["attribution"])
        self.ledger.cut(self.optimizer.signals.step)
        self.lost, self.latest_is_lost = self.lost + 1, True

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

    def state(self, place: Path, *, weights: bool = True) -> dict[str, Any]:
        """What the next step depends on; the weights and what goes with them only where they are asked for.

        Args:
            place: a new folder, for what is not in the state.
        """
        if self.consolidate:
            self.consolidate(place)
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {"optimizer": self.optimizer.state_dict(place / "engine", weights=weights), **parts}

    def save(self) -> str:
        """Save a checkpoint, and say how to go on from it.

        Raises:
            CannotWriteError: it cannot be written; the one before is whole.
        """
        with self.folder.saving(self.ranks.rank == 0):
            self._save(self.optimizer.signals.step)
        return f" (saved in {self.folder.path}; go on with the same command and --resume)"

    def saved_after(self, error: UserError) -> str:
        """Save before a run ends in an error, if there is something worth saving, and if all ranks are there to save."""
        together = self.ranks.world_size == 1 or isinstance(error, DivergedError)
        others = isinstance(error, CannotWriteError | DriftError)  # drift is of weights that somebody else wrote
        if others or not together or not self.optimizer.engine.is_finite():
            return ""
        try:
            return self.save()
        except CannotWriteError as unsaved:
            return f"; and {unsaved}{self.folder.way_on()}"

    def way_on_after(self, error: CannotWriteError) -> str:
        """How to go on where something could not be written, from as late a step as can be saved now."""
        is_newer = self.optimizer.signals.step > (self.folder.saved_step() or 0)
        of_checkpoint = error.path is not None and error.path.is_relative_to(self.folder.checkpoints)
        if is_newer and not of_checkpoint and self.ranks.world_size == 1 and self.optimizer.engine.is_finite():
            with suppress(CannotWriteError):
                self.save()
        return self.folder.way_on()

    def load(self) -> None:
        """Bring the run to the latest checkpoint that is whole.

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
        self.base, self.lost, self.latest_is_lost = start, 0, False
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.ranks.wait()
        self.ledger.go_on_at(step)
        if self.ranks.rank == 0:
            self.folder.drop_after(step)
        self.ranks.wait()

    def finish(self) -> None:
        """The run is over: nothing is needed to go on from, and snapshots only if they were asked for."""
        remove_checkpoints(self.folder.checkpoints, light_only=self.keeping.snapshots != "checkpoint")

    def _save(self, step: int, whole: bool = False) -> None:
        whole = whole or not self._is_reached(step)

        def state(place: Path) -> dict[str, Any]:
            digest = {} if whole else {"weights": weights_digest(self.optimizer.engine)}
            return {**self.state(place, weights=whole), **digest}

        base, keep = None if whole else self.base, self.keeping.keep_checkpoints
        save_checkpoint(self.folder.checkpoints, step, self.ranks, state, base=base, keep=keep, marked=self.marked)
        if whole:
            self.base, self.lost = step, 0

    def _is_reached(self, step: int) -> bool:
        return (
            not self.consolidate
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

    def _steps(self, first: int, end: int) -> Iterator[dict[str, Any]]:
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
