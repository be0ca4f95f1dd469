"""A study from beginning to end, or from where it was stopped. Next: `jobs.py`, then `results.py`.

One idea: three stages over the same cells (fit to the memory, search learning rates, train every seed), in each of which a run that has
finished is read and not repeated; so going on with a study is running it again.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_opt.config.adaptive import Adaptive
from hybrid_opt.config.run import RunFile
from hybrid_opt.config.schedule import Alternate, acting_names
from hybrid_opt.scheduling.schedule import build_schedule
from hybrid_opt.scheduling.signals import Signals
from hybrid_opt.studies.arms import Cell, StudyPlan
from hybrid_opt.studies.jobs import WAITING, Outcome, Stop, standing, train
from hybrid_opt.studies.results import SUMMARY_COLUMNS, result_row, summarise, write_csv, write_results
from hybrid_opt.studies.search import search_factor
from hybrid_opt.studies.study_folder import StudyFolder
from hybrid_opt.training.goal import shown
from hybrid_opt.training.interrupt import stop_requests

LONGEST_TRIAL = 50
"""Most steps of a trial of an arm's memory."""
NO_METRIC = ("loss", "reward", "finished")
"""Measures that are shown anyway, or say nothing of how good a model is."""


@dataclass
class Chosen:
    """What the first two stages found for a cell."""

    cell: Cell
    """The cell as it is trained."""
    fitted: str = ""
    """What was changed to fit the memory."""
    factor: float = 1.0
    """Factor of its learning rates."""
    error: str | None = None
    """Why it cannot be trained."""


class Ablation:
    """Runs a study.

    Args:
        plan: cells and runs.
        say: is given lines about what happened.
        show: is given a line about what is happening.
        overwrite: begin anew.
        allow_code: let the runs execute the code that their run files name.

    Raises:
        UserError: see `StudyPlan.refuse_code`, `StudyFolder.take` and `standing`.
    """

    def __init__(
        self,
        plan: StudyPlan,
        *,
        say: Callable[[str], None],
        show: Callable[[str], None] = lambda text: None,
        overwrite: bool = False,
        allow_code: bool = False,
    ) -> None:
        plan.refuse_code(allow_code)
        self.allow_code = allow_code
        self.plan, self.study, self.say, self.show = plan, plan.study, say, show
        self.threads = self.study.threads or max(1, available_cores() // self.study.processes)
        self.folder = StudyFolder(self.study.output)
        self.lock = self.folder.take(overwrite=overwrite)
        self.chosen = {cell.place: Chosen(cell) for cell in plan.cells}
        self.outcomes = {(cell.place, seed): WAITING for seed in self.study.seeds for cell in plan.cells}
        self.metric, self.summaries = self.study.metric, []
        self.changing = threading.Lock()
        self.running: list[str] = []

    def run(self) -> bool:
        """Whether every run was made (if not, it was interrupted)."""
        self.folder.write_study(self.study.model_dump(mode="json", exclude_none=True))
        if not self.folder.results.exists():  # those of an earlier process are still right
            self._record()
        with stop_requests(self.say) as requested:
            self.stop = Stop(requested)
            stages = (
                (self._fit, list(self.chosen.values())),
                (self._search, list(self.chosen.values())),
                (self._train, list(self.outcomes)),
            )
            for work, items in stages:
                self._all(work, items)
        self.show("")
        return not any(outcome.status in ("waiting", "interrupted") for outcome in self.outcomes.values())

    def _all(self, work: Callable[[Any], None], items: list[Any]) -> None:
        """Do the work on all items, as many at a time as there may be processes."""
        with ThreadPoolExecutor(self.study.processes) as pool:
            try:
                list(pool.map(lambda item: None if self.stop.requested() else work(item), items))
            except BaseException:  # a second Ctrl-C, or a mistake that no other run should be made after
                self.stop.at_once.set()
                raise

    # ------------------------------------------------------------ stages

    def _fit(self, chosen: Chosen) -> None:
        """Take the first rung of changes with which a trial's steps stay within the memory."""
        limit, peaks = chosen.cell.budget.peak_memory, []
        for number, (fitted, cell) in enumerate(self.plan.rungs(chosen.cell) if limit else ()):
            folder = self.folder.fit / cell.place / f"rung-{number}"
            outcome = self._made(
                self._trial(cell, folder), f"memory of {_named(cell)}{f' with {fitted}' if fitted else ''}"
            )
            if outcome.status == "interrupted":
                return
            if outcome.summary and outcome.summary["peak_memory_bytes"] <= limit:
                chosen.cell, chosen.fitted = cell, fitted
                return
            peaks.append(outcome.summary["peak_memory_bytes"] if outcome.summary else outcome.error)
        if peaks:
            needs = min((p for p in peaks if isinstance(p, int)), default=None)
            needs = f"needs {needs / 1e9:.3g} GB at the least" if needs else f"failed: {peaks[-1]}"
            chosen.error = f"does not fit into {limit / 1e9:.3g} GB: {needs}"

    def _trial(self, cell: Cell, folder: Path) -> RunFile:
        """Steps of the cell in which every estimator acts, turns cut to one step each, without evaluations."""
        schedule = self.plan.run(cell, self.study.seeds[0], folder).schedule.schedule
        if isinstance(schedule, Alternate | Adaptive):
            turns = {"type": "alternate", "pattern": dict.fromkeys(acting_names(schedule), 1)}
            cell = cell.changed((["schedule", "schedule"], turns))
        steps = _steps_until_all_act(self.plan.run(cell, self.study.seeds[0], folder))
        nothing = {
            "data.validation": None,
            "training.probe_rows": 0,
            "training.evaluate_every": 0,
            "training.divergence": None,
            "training.budget": None,
        }
        changes = [(key.split("."), value) for key, value in {**nothing, "training.steps": steps}.items()]
        return self.plan.run(cell, self.study.seeds[0], folder, *changes)

    def _search(self, chosen: Chosen) -> None:
        """Take the factor of the learning rates with the lowest loss."""
        if (search := self.study.learning_rates) is None or chosen.error:
            return
        seed, cell, errors = _seed(search, self.study.seeds), chosen.cell, []

        def loss_with(factor: float) -> float | None:
            folder = self.folder.search / cell.place / f"x{factor:.6g}"
            run = self.plan.run(cell, seed, folder, *self.plan.rates_times(cell, factor))
            outcome = self._made(run, f"learning rates x {factor:.3g} of {_named(cell)}")
            if outcome.error:
                errors.append(outcome.error)
                return float("inf")
            return outcome.summary and outcome.summary["after"].get("loss")

        factor = search_factor(search, loss_with)
        if factor is None and errors:
            chosen.error = f"failed with all learning rates: {errors[-1]}"
        elif factor is not None:
            chosen.factor = factor
            chosen.cell = cell.changed(*self.plan.rates_times(cell, factor))

    def _train(self, key: tuple[Path, int]) -> None:
        place, seed = key
        chosen = self.chosen[place]
        if chosen.error:
            outcome = Outcome("failed", error=chosen.error)
        else:
            run = self.plan.run(chosen.cell, seed, self._folder(place, seed))
            outcome = self._made(run, f"{_named(chosen.cell)}, seed {seed}")
        with self.changing:
            self.outcomes[key] = outcome
            self._record()

    # ------------------------------------------------------------ runs and records

    def _made(self, run: RunFile, name: str) -> Outcome:
        """The run's outcome: what it was, if it had finished; else what it is after training it."""
        outcome = standing(run)
        if outcome.status != "finished":
            with self._shown(name):
                outcome = train(run, allow_code=self.allow_code, threads=self.threads, stop=self.stop, lock=self.lock)
            self.say(f"{name}: {_told(outcome)}")
        return outcome

    @contextmanager
    def _shown(self, name: str) -> Iterator[None]:
        """Inside, the name is among those that are shown."""
        self._show(self.running.append, name)
        try:
            yield
        finally:
            self._show(self.running.remove, name)

    def _show(self, change: Callable[[str], None], name: str) -> None:
        with self.changing:
            change(name)
            done = sum(outcome.status == "finished" for outcome in self.outcomes.values())
            running = "; ".join(self.running)
            self.show(f"{done} of {len(self.outcomes)} runs; now: {running}" if running else "")

    def _folder(self, place: Path, seed: int) -> Path:
        return self.folder.runs / place / f"seed-{seed}"

    def _record(self) -> None:
        """Write what is known by now."""
        rows = list(self._rows())
        write_results(rows, self.folder.path)
        cells = [tuple(cell.names.values()) for cell in self.plan.cells]
        summaries = summarise(rows, cells, self.study.reference)
        for summary, cell in zip(summaries, self.plan.cells, strict=True):
            own = (self.outcomes[cell.place, seed] for seed in self.study.seeds)
            summary["failed"] = sum(outcome.status == "failed" for outcome in own)
        write_csv(summaries, SUMMARY_COLUMNS, self.folder.summary)
        self.summaries = summaries
        self.folder.write_index(self._index())

    def _rows(self) -> Iterator[dict[str, Any]]:
        for (place, seed), outcome in self.outcomes.items():
            if outcome.summary:
                self.metric = self.metric or next((m for m in outcome.summary["after"] if m not in NO_METRIC), None)
                chosen = self.chosen[place]
                found = {"seed": seed, "learning_rate_factor": chosen.factor, "fitted": chosen.fitted}
                yield result_row(outcome.summary, self.metric, **chosen.cell.names, **found)

    def errors(self) -> dict[str, list[str]]:
        """Why runs failed, and which."""
        found: dict[str, list[str]] = {}
        for (place, seed), outcome in self.outcomes.items():
            if outcome.error:
                found.setdefault(outcome.error, []).append(f"{_named(self.chosen[place].cell)}, seed {seed}")
        return found

    def _index(self) -> dict[str, Any]:
        return {
            "title": self.plan.path.stem,
            "description": self.study.description,
            "reference": self.study.reference,
            "metric": self.metric,
            "metric_better": "lower" if self.metric == "perplexity" else "higher",
            "tasks": self.plan.tasks,
            "budgets": [budget.label for budget in self.study.budgets],
            "arms": [arm.name for arm in self.plan.arms],
            "seeds": list(self.study.seeds),
            "runs": [
                {
                    **self.chosen[place].cell.names,
                    "seed": seed,
                    "folder": str(self._folder(place, seed).relative_to(self.folder.path)),
                    "status": outcome.status,
                    "error": outcome.error,
                }
                for (place, seed), outcome in self.outcomes.items()
            ],
        }


def _steps_until_all_act(run: RunFile) -> int:
    """Steps until every estimator of the schedule has acted, and one more; no more than LONGEST_TRIAL."""
    schedule, missing = build_schedule(run.schedule.schedule), set(acting_names(run.schedule.schedule))
    for step in range(LONGEST_TRIAL - 1):
        missing -= set(schedule.plan(step, Signals(step=step)))
        if not missing:
            return step + 2
    return LONGEST_TRIAL


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _seed(search: Any, seeds: tuple[int, ...]) -> int:
    return max(seeds) + 1 if search.seed is None else search.seed


def _named(cell: Cell) -> str:
    return ", ".join(cell.names.values())


def _told(outcome: Outcome) -> str:
    if outcome.summary is None:
        return (
            f"{outcome.status}: {outcome.error}"
            if outcome.error
            else f"{outcome.status}; the same command goes on with it"
        )
    measures = ", ".join(f"{name} {value:.4g}" for name, value in shown(outcome.summary["after"]).items())
    peak = outcome.summary["peak_memory_bytes"] / 1e9
    told = f"{outcome.summary['steps']} steps, {outcome.summary['seconds']:.1f} s, {peak:.2f} GB"
    return f"{measures}; {told}" if measures else told
