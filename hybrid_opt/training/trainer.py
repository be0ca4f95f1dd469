"""The loop: steps, evaluations, checkpoints, and what a run leaves behind. Next: `deciding.py`, `hybrid_optimizer.py`, `../run_files/journal.py`.

One idea: the trainer adds nothing to the method. It asks `HybridOptimizer` for one step after another and writes down
what happened, so a loop of one's own around the same object gives the same weights.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hybrid_opt.config.divergence import Divergence
from hybrid_opt.config.engines import Engine as EngineConfig
from hybrid_opt.config.keeping import Keeping
from hybrid_opt.config.reporting import refuse_missing_packages, reporters
from hybrid_opt.config.schedule import ScheduleFile
from hybrid_opt.config.training import Budget
from hybrid_opt.display.dashboard import display_for
from hybrid_opt.display.progress import Display, Displays, Silence
from hybrid_opt.display.trackers import Trackers, hyperparameters
from hybrid_opt.errors import UserError
from hybrid_opt.machine.description import describe_machine
from hybrid_opt.machine.memory import forget_peak, peak_memory_bytes
from hybrid_opt.objectives.batches import Batches, as_batches
from hybrid_opt.objectives.contract import Generates, Objective
from hybrid_opt.objectives.generators import Generators
from hybrid_opt.recovery.keeping import Keeper
from hybrid_opt.run_files.durable import CannotWriteError
from hybrid_opt.run_files.journal import Journal
from hybrid_opt.run_files.metrics import metrics_row
from hybrid_opt.run_files.run_folder import RunFolder
from hybrid_opt.run_files.summary import Summary
from hybrid_opt.training.deciding import Decisions
from hybrid_opt.training.divergence import Guard
from hybrid_opt.training.evaluation import evaluate
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from hybrid_opt.training.interrupt import stop_requests
from hybrid_opt.training.save_model import save_model
from hybrid_opt.training.update_norms import UpdateNorms


class Trainer:
    """Trains a model for a number of steps, or until a budget is spent.

    Args:
        model: any `torch.nn.Module`.
        objective: `losses(model, batch) -> Tensor (examples,)`, or an Objective.
        batches: an iterable of batches, started again when it ends, or an object with `batch_at(step)`.
        schedule: a path, a shipped recipe's name, a dictionary, or a `ScheduleFile`.
        objectives: what some estimators minimise instead, by their names in the schedule, each with its own batches.
        steps: number of steps; None: as many as the budget allows.
        budget: what the steps may spend; None: no limit.
        seed: decides all noise.
        engine: where the weights live, the `engine` section of a run file; None: where they are. With many processes (ZeRO) every
            one of them passes the same batches, and rank 0 writes the folder.
        validation: batches to evaluate on before and after.
        evaluate_every: steps between evaluations along the way; 0: none.
        validation_along: fewer batches for those; None: the same.
        probe: batches on which each estimator's contribution is measured.
        checkpoint_every: steps between checkpoints; 0: only when interrupted.
        keeping: how many checkpoints are kept, and when they have weights.
        divergence: what is done about a loss that grows; None: only one that is not finite ends the run.
        check_drift_every, memory_budget: see `HybridOptimizer`.
        output: run folder; None: nothing is written.
        overwrite: replace the run that the folder holds.
        resume: go on from the folder's newest checkpoint.
        saves_model: leave the final model in the folder.
        tokenizer: saved with the model.
        config: resolved configuration to keep in the run folder.
        display: what shows the progress; None: as `display_for` chooses.
        report_to: experiment trackers to report to as well, by transformers' names for them: `tensorboard`, `[tensorboard, wandb]`.
        notes: lines to be said, and kept, at the start.

    Raises:
        UserError: see `HybridOptimizer` and `RunFolder.check`.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | Callable[[nn.Module, Any], Tensor],
        batches: Iterable[Any] | Batches,
        *,
        schedule: str | Path | dict[str, Any] | ScheduleFile,
        objectives: Mapping[str, tuple[Objective | Callable[[nn.Module, Any], Tensor], Iterable[Any] | Batches]]
        | None = None,
        steps: int | None = None,
        budget: Budget | None = None,
        seed: int = 0,
        engine: EngineConfig | None = None,
        validation: Sequence[Any] = (),
        evaluate_every: int = 0,
        validation_along: Sequence[Any] | None = None,
        probe: Sequence[Any] = (),
        checkpoint_every: int = 0,
        keeping: Keeping = Keeping(),
        divergence: Divergence | None = None,
        check_drift_every: int = 50,
        memory_budget: int | str | None = None,
        output: str | Path | None = None,
        overwrite: bool = False,
        resume: bool = False,
        saves_model: bool = True,
        tokenizer: Any = None,
        config: dict[str, Any] | None = None,
        display: Display | None = None,
        report_to: str | Sequence[str] = "none",
        notes: Sequence[str] = (),
    ) -> None:
        if steps is None and budget is None:
            raise UserError(
                "steps: neither steps nor a budget says when to stop; pass steps=100, or budget=Budget(seconds=600)"
            )
        self.folder = RunFolder(output) if output is not None else None
        if self.folder:
            self.folder.check(overwrite=overwrite, resume=resume)
        elif resume:
            raise UserError("resume: a run without an output folder cannot be resumed")
        elif reporters(report_to):
            raise UserError(
                "report_to: trackers need an output folder, whose name they give to the run; pass output=..."
            )
        refuse_missing_packages(report_to)
        own = objectives or {}
        self.optimizer = HybridOptimizer(
            model,
            objective,
            schedule=schedule,
            objectives={name: other for name, (other, _) in own.items() if other is not objective},
            steps=steps,
            seed=seed,
            engine=engine,
            check_drift_every=check_drift_every,
            memory_budget=memory_budget,
        )
        self.ranks = self.optimizer.engine.ranks
        self.consolidates = getattr(engine, "consolidate", False)
        self.batches = as_batches(batches)
        self.own_batches = {name: as_batches(batches) for name, (_, batches) in own.items()}
        self.steps, self.budget = steps, budget
        self.evaluate_every, self.checkpoint_every, self.saves_model = evaluate_every, checkpoint_every, saves_model
        self.is_reward = isinstance(self.optimizer.objective, Generates)
        self.update_norms = UpdateNorms(self.optimizer.engine)
        self.validation = validation
        self.validation_along = validation if validation_along is None else validation_along
        self.resume, self.tokenizer, self.config, self.notes = resume, tokenizer, config, notes
        self.display = Silence() if self.ranks.rank else display or display_for("auto", budget=budget)
        if self.folder and not self.ranks.rank and reporters(report_to):
            shown = hyperparameters(config, self.optimizer, steps)
            tracked = Trackers(report_to, self.folder, shown, model, tokenizer, self.display.say)
            self.display = Displays(self.display, tracked)
        self.journal = Journal(self.folder, self.display, writes=self.ranks.rank == 0)
        self.keeper = self._keeper(keeping, tokenizer) if self.folder else None
        self.decisions = Decisions(
            self.optimizer, (lambda: self._evaluate(probe)["loss"]) if probe else None, self.keeper, self.journal.say
        )
        self.attribution = self.decisions.attribution
        self.guard = Guard(
            divergence,
            self.optimizer,
            self.keeper,
            self.journal.say,
            evaluates=bool(evaluate_every and self.validation_along),
        )
        if self.keeper:
            device = self.optimizer.engine.device
            self.keeper.parts |= {
                "attribution": self.attribution,
                "divergence": self.guard,
                "random": Generators(device),
            }

    def train(self) -> Summary:
        """Take the steps that are left, and write the model, the metrics and the summary.

        An interrupt (Ctrl-C, SIGTERM) lets the current step end, saves a checkpoint and returns what there is so far.

        Raises:
            UserError: losses that are not finite, or batches that ended; a checkpoint is saved first. Or something could not be
                written; what had been saved is whole.
        """
        held = self.journal.held(self.steps, self.budget, resume=self.resume)
        with self.ranks.loss_reported(), stop_requests(self.journal.say) as stop_requested, held:
            try:
                self._begin()
                return self._shown(stop_requested)
            except CannotWriteError as error:
                raise CannotWriteError(f"{error}{self.keeper.way_on_after(error)}") from None

    def _shown(self, stop_requested: Callable[[], bool]) -> Summary:
        """What the display sees of the run."""
        try:
            self.journal.start(self.optimizer.signals.step, self.steps)
            for note in self.notes:
                self.journal.say(note)
            if not self.resume:
                self._measure_before()
                self.decisions.begin({None: self.batches, **self.own_batches})
            try:
                finished = self._loop(stop_requested)
            except CannotWriteError:
                raise  # `train` says how to go on
            except UserError as error:
                saved = self.keeper.saved_after(error) if self.keeper else ""
                raise type(error)(f"{error}{saved}") from None
            return self._end() if finished else self._interrupted()
        finally:
            self.display.stop()

    def _loop(self, stop_requested: Callable[[], bool]) -> bool:
        """Whether the run came to its end."""
        self.began = self.optimizer.signals.step
        while not self.ranks.any(self.done() >= 1):
            if self.ranks.any(stop_requested()):
                return False
            step = self.optimizer.signals.step
            self._evaluate_if_due(step)
            self.decisions.plan()
            self._save_if_due(step)
            self._step(step)
        return True

    def done(self) -> float:
        """How much of the run is done, from 0 to 1 (or a little more, where the last step overran the budget)."""
        signals = self.optimizer.signals
        shares = [signals.step / self.steps] if self.steps else []
        return max(shares + ([self.budget.spent(signals)] if self.budget else []))

    def _evaluate_if_due(self, step: int) -> None:
        is_due = step and self.evaluate_every and step % self.evaluate_every == 0 and self.validation_along
        if is_due and self.journal.evaluated_at < step:  # a resumed run may have done it
            self.journal.evaluated(measures := self._evaluate(self.validation_along), self.optimizer.signals)
            self.optimizer.tell({"validation_loss": measures["loss"]})
            self.guard.evaluated(measures["loss"])

    def _save_if_due(self, step: int) -> None:
        is_due = self.checkpoint_every and step % self.checkpoint_every == 0
        if step > self.began and (is_due or (self.keeper and self.keeper.is_due(self.optimizer.acting()))):
            self._save()

    def _step(self, step: int) -> None:
        acting = self.optimizer.acting()
        self.attribution.before_step(tuple(acting))
        self.update_norms.before(self.optimizer.may_come_to_move(acting))
        device = self.optimizer.engine.device
        forget_peak(device)
        own = {name: self.own_batches[name].batch_at(step) for name in acting if name in self.own_batches}
        batch = None if own.keys() >= set(acting) else self.batches.batch_at(step)
        report = self.guard.taken(lambda: self.optimizer.step(batch, own))
        if report is None:
            return
        norms = self.update_norms.after({name: self.optimizer.may_move(name) for name in acting})
        own = self.optimizer.objectives
        peak = peak_memory_bytes(device)
        signals = self.decisions.stepped(report, peak, acting)
        row = metrics_row(report, peak, norms, signals=signals, is_reward=self.is_reward, own=own)
        row |= self.guard.told()
        if self.keeper:
            self.keeper.stepped(report)
        self.journal.stepped(row, self.done())
        self.guard.stepped(report.loss)

    # ------------------------------------------------------------ beginning and end

    def _begin(self) -> None:
        if self.resume:
            self._load()
            return
        if self.journal.writes:
            self.folder.prepare()
            self.keeper.begin()
            if self.config is not None:
                self.folder.write_config(self.config)
            self.folder.write_machine(describe_machine(self.optimizer.engine.device, self.ranks.world_size))
        self.ranks.wait()
        if self.folder and not self.folder.path.is_dir():
            raise UserError(
                f"output: {self.folder.path} was made by rank 0, but rank {self.ranks.rank} does not see it; choose a folder on a "
                "file system that all machines share"
            )

    def _measure_before(self) -> None:
        if self.validation:
            self.display.say("evaluating before the first step ...")
            self.journal.before = self._evaluate(self.validation)
            self.journal.evaluated(self.journal.before, self.optimizer.signals)
        along = self.validation_along  # the rows that the guard will go on seeing
        self.guard.begin(lambda: self.journal.before if along is self.validation else self._evaluate(along))

    def _end(self) -> Summary:
        if self.folder and self.saves_model:  # first, so that nothing is lost whatever happens to the rest
            save_model(self.optimizer.engine, self.tokenizer, self.folder.path)
        self.attribution.finish()
        after = {}
        if self.validation:
            self.display.say("evaluating after the last step ...")
            after = self._evaluate(self.validation)
            self.journal.evaluated(after, self.optimizer.signals)
        summary = self._summary(after)
        if self.journal.writes:
            self.keeper.finish()
        self.optimizer.engine.leave()
        return summary

    def _interrupted(self) -> Summary:
        self.journal.say(f"stopped after {self.optimizer.signals.step} steps{self._save()}")
        self.optimizer.engine.leave()
        return self._summary({}, finished=False)

    def _summary(self, after: dict[str, float], finished: bool = True) -> Summary:
        return self.journal.summary(
            self.optimizer.signals,
            after,
            self.attribution.decrease,
            goal="reward" if self.is_reward else "loss",
            roll_backs=self.guard.roll_backs,
            finished=finished,
        )

    def _evaluate(self, batches: Sequence[Any]) -> dict[str, float]:
        return evaluate(self.optimizer.engine, self.optimizer.objective, batches)

    # ------------------------------------------------------------ checkpoints

    def _keeper(self, keeping: Keeping, tokenizer: Any) -> Keeper:
        def consolidate(place: Path) -> None:
            save_model(self.optimizer.engine, tokenizer, place)

        return Keeper(
            self.folder,
            self.optimizer,
            keeping,
            config=self.config,
            consolidate=consolidate if self.consolidates else None,
            say=lambda line: self.journal.say(line),
        )

    def _save(self) -> str:
        """Save a checkpoint, if there is a folder, and say how to go on from it. All ranks do this together."""
        return self.keeper.save() if self.keeper else ""

    def _load(self) -> None:
        self.keeper.load()
        self.keeper.marked = self.optimizer.schedule.mark
        self.journal.read()
