"""The weights of any step of a run that is over, from its nearest snapshot and its ledger. Next: `export.py`.

One idea: a run folder has all that it takes: `run.yaml` for the model at the start, checkpoints with weights, and the ledger for what lies
between. Data and objective are not needed, since nothing is evaluated.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hybrid_opt.config.foreign_code import code_of_model, refuse_code
from hybrid_opt.config.loading import load_run
from hybrid_opt.config.run import RunFile
from hybrid_opt.errors import UserError
from hybrid_opt.models.loading import load_model
from hybrid_opt.recovery.checkpoint import base_of, checkpoints, load_checkpoint, place_of, step_of, verified
from hybrid_opt.recovery.ledger import NAME, PACKED, read_steps, whole_lines
from hybrid_opt.recovery.records import description_of
from hybrid_opt.run_files.run_folder import RunFolder
from hybrid_opt.training.build import with_engine_dtype
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer


@dataclass(frozen=True)
class Replayed:
    """A model as it was after some step of a run."""

    optimizer: HybridOptimizer
    step: int
    base: int
    """Step of the snapshot from which the ledger led there; 0: the model at the start."""


def replay(
    source: Path,
    to_step: int | None = None,
    *,
    allow_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Replayed:
    """Make the weights after a step of a run again.

    Args:
        source: a run folder, or what `export` wrote.
        to_step: how many steps of the run to take; None: as many as possible.
        allow_code: whether Python code that comes with the model at the start may run.

    Raises:
        UserError: the folder holds no run with a ledger, no way leads to the step, or the model is another than the run's.
    """
    ledger, run = find_ledger(source), read_run(source)
    refuse_code(code_of_model(run.model), allow_code)
    optimizer = _untrained(run)
    ranks = optimizer.engine.ranks
    way = Way.through(source, ledger, description_of(optimizer.engine))
    step = way.end() if to_step is None else to_step
    base = way.base(step)
    if base:
        place = place_of(RunFolder(source).checkpoints, base)
        verified(place)
        optimizer.load_state_dict(load_checkpoint(place, ranks.rank)["optimizer"], place / "engine")
    for document in read_steps(ledger, base, step, way.model):
        optimizer.replay(document)
        if document["step"] % 100 == 99:
            say(f"step {document['step'] + 1} of {step}")
    return Replayed(optimizer, step, base)


def refuse_present(folder: Path) -> None:
    """Raise UserError if something is there already that would be overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: it is there already; choose a new folder with --output")


def find_ledger(source: Path) -> Path:
    """The ledger in a folder.

    Raises:
        UserError: there is none.
    """
    for name in (NAME, PACKED):
        if (source / name).is_file():
            return source / name
    what = "no such folder" if not source.is_dir() else "it has no ledger.jsonl, so no run has left it"
    raise UserError(f"{source}: {what}; give the output folder of a run, or a folder that hybrid-opt export wrote")


def read_run(source: Path) -> RunFile:
    """The configuration of the run that left a folder.

    Raises:
        UserError: there is none.
    """
    if not (source / "run.yaml").is_file():
        raise UserError(f"{source}: it has no run.yaml, so nothing says which model its steps were taken with")
    return load_run(source / "run.yaml")


@dataclass(frozen=True)
class Way:
    """Which steps of a run can be reached."""

    source: Path
    model: dict
    recorded: frozenset[int]
    """Steps that the ledger holds."""
    cuts: frozenset[int]
    """Steps that do not begin where those before have ended."""
    snapshots: tuple[int, ...]
    """After how many steps there are weights, the latest first, without the start."""

    @classmethod
    def through(cls, source: Path, ledger: Path, model: dict) -> "Way":
        """The way through a run folder."""
        steps, cuts = set(), set()
        for line in whole_lines(ledger, model):
            if line.step is not None:
                steps.add(line.step)
            elif line.cut is not None:
                cuts.add(line.cut)
        whole = [place for place in checkpoints(RunFolder(source).checkpoints) if base_of(place) == place]
        return cls(source, model, frozenset(steps), frozenset(cuts), tuple(map(step_of, whole)))

    def base(self, step: int) -> int:
        """The latest snapshot from which the ledger leads to a step.

        Raises:
            UserError: there is none.
        """
        for base in (*(s for s in self.snapshots if s <= step), 0):
            if step <= self._last_from(base):
                return base
        reached = ", ".join(f"{first} to {last}" if last > first else str(first) for first, last in self._reached())
        raise UserError(
            f"{self.source}: no way leads to step {step}; reached are {reached}. Steps of backprop are not in the ledger, and "
            "training.snapshots says when weights are saved after them"
        )

    def end(self) -> int:
        """The latest step that can be reached."""
        return max(last for _, last in self._reached())

    def _reached(self) -> Iterator[tuple[int, int]]:
        for first in sorted({0, *self.snapshots}):
            yield first, self._last_from(first)

    def _last_from(self, first: int) -> int:
        last = first
        while last in self.recorded and (last == first or last not in self.cuts):
            last += 1
        return last


def _untrained(run: RunFile) -> HybridOptimizer:
    return HybridOptimizer(
        load_model(with_engine_dtype(run), run.peft, run.training.seed),
        schedule=run.schedule,
        steps=run.training.steps,
        seed=run.training.seed,
        engine=run.engine,
    )
