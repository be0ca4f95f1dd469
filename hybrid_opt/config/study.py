"""What a study file may say: a base run, what is varied, what every arm may spend, and what it is compared with.

One idea: an arm is a name and changes of the base run, whoever made them: an axis, the study's author, or a built-in baseline.
Next: `../studies/arms.py`, which makes the runs.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, field_validator, model_validator
from typing_extensions import Self

from hybrid_opt.config.run import RunFile
from hybrid_opt.config.strict import NonNegativeInt, PositiveFloat, PositiveInt, Strict, Text
from hybrid_opt.config.training import Budget

Changes = dict[str, Any]
"""Values by dotted key, as on the command line: `{training.batch_size: 4, schedule: es_only}`."""

BaselineName = Literal[
    "backprop_checkpointing",
    "lora",
    "mezo",
    "ea4llm",
    "scheduler_off",
    "order_swapped",
    "stale_gradient",
]


class StudyBudget(Budget):
    """What each run may spend in its steps: exactly one of seconds, tokens, forward_equivalents and steps; and what it may hold."""

    steps: PositiveInt | None = None
    """Steps."""
    peak_memory: ByteSize | None = None
    """Most memory during a step, such as `1.7GB`. An arm that needs more takes the first rung of `fit` with which it does not."""

    @model_validator(mode="after")
    def _one_currency(self) -> Self:
        if len(self.model_dump(exclude_none=True, exclude={"peak_memory"})) != 1:
            raise ValueError("a study's budget is exactly one of seconds, tokens, forward_equivalents and steps")
        return self

    @property
    def label(self) -> str:
        """Such as `600 seconds` or `600 seconds in 1.7 GB`."""
        ((currency, amount),) = self.model_dump(exclude_none=True, exclude={"peak_memory"}).items()
        within = f" in {self.peak_memory / 1e9:.3g} GB" if self.peak_memory else ""
        return f"{amount:g} {currency.replace('_', '-')}{within}"


class LearningRateGrid(Strict):
    """Every arm tries the same factors on its own learning rates and keeps the one with the lowest loss at the budget."""

    type: Literal["grid"]
    factors: Annotated[tuple[PositiveFloat, ...], Field(min_length=2)] = (0.3, 1.0, 3.0)
    """Factors of all learning rates of the arm."""
    seed: NonNegativeInt | None = None
    """Seed of the search's runs; null: one more than the highest of the study's, so that no seed is both chosen by and reported."""

    @property
    def tries(self) -> int:
        """Runs of the search for each arm."""
        return len(self.factors)


class LearningRateSampling(Strict):
    """Every arm tries as many factors, which optuna chooses (extra `search`), and keeps the one with the lowest loss."""

    type: Literal["optuna"]
    trials: Annotated[int, Field(ge=2)] = 8
    """Factors to try for each arm."""
    low: PositiveFloat = 0.03
    """Lowest factor."""
    high: PositiveFloat = 30.0
    """Highest factor; they are drawn evenly in their logarithm at first."""
    seed: NonNegativeInt | None = None
    """As for the grid."""

    @property
    def tries(self) -> int:
        """Runs of the search for each arm."""
        return self.trials

    @model_validator(mode="after")
    def _low_is_lower(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        return self


class StudyFile(Strict):
    """The whole of a study file."""

    description: str = ""
    """What the study asks, in a sentence or two."""
    base: Text
    """The run file that everything else changes. File names are looked up from here, then beside the study file."""
    changes: Changes = {}
    """Changes for all runs, made after those of the tasks."""
    tasks: dict[str, Changes] = {}
    """Changes that make the base run into each of several tasks; arms are compared within a task."""
    axes: dict[str, list[Any] | dict[str, Any]] = {}
    """What is varied; an arm for each combination. Under a dotted key (or `schedule`) values, in a list or by labels; under any other
    name labels with changes."""
    arms: dict[str, Changes] = {}
    """Further arms, by their changes; `base: {}` is the base run itself."""
    baselines: tuple[BaselineName, ...] = ()
    """Built-in arms, made from the base run's schedule (see `studies/baselines.py`)."""
    reference: str | None = None
    """The arm that the others are compared with, on the same seeds; null: nobody."""
    budgets: Annotated[tuple[StudyBudget, ...], Field(min_length=1)]
    """What each run may spend. With several every arm runs once for each."""
    fit: tuple[Changes, ...] = ()
    """Changes that save memory, least harmful first, for budgets with peak_memory. Each rung stands alone."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2)
    """Every arm runs once with each."""
    learning_rates: Annotated[LearningRateGrid | LearningRateSampling, Field(discriminator="type")] | None = None
    """How every arm finds its learning rates; null: they are as written."""
    metric: str | None = None
    """Measure of the validation rows to report beside the loss or the reward, such as accuracy; null: the first that the objective has."""
    processes: PositiveInt = 1
    """Runs at the same time."""
    threads: PositiveInt | None = None
    """Threads of each; null: the cores, divided evenly."""
    checkpoint_every: NonNegativeInt = 50
    """Steps between checkpoints, from which a killed run goes on; 0: only a stopped one does."""
    keep_models: bool = False
    """Leave every run's final model in its folder."""
    output: Text
    """Folder of the study."""

    @field_validator("seeds", "baselines", "budgets")
    @classmethod
    def _each_once(cls, values: Any) -> Any:
        for i, value in enumerate(values):
            if value in values[:i]:
                raise ValueError(f"{getattr(value, 'label', value)} is written twice")
        return values

    @field_validator("axes")
    @classmethod
    def _levels_are_clear(cls, axes: Any) -> Any:
        for key, levels in axes.items():
            if not levels:
                raise ValueError(f"{key} has no values")
            if is_field(key):
                continue
            if not isinstance(levels, dict) or not all(isinstance(changes, dict) for changes in levels.values()):
                raise ValueError(
                    f"{key} is no field of a run file, so its levels must be labels with changes, such as "
                    f"{key}: {{small: {{training.batch_size: 4}}}}"
                )
        return axes

    @model_validator(mode="after")
    def _changes_are_of_runs(self) -> Self:
        for where, key in self._changed_fields():
            if key.split(".")[0] not in RunFile.model_fields:
                raise ValueError(f"{where}: {key!r} is not a field of a run file, such as training.batch_size")
            if key in SETTLED:
                raise ValueError(f"{where}: {key} is settled by the study; write {SETTLED[key]}")
        return self

    def _changed_fields(self) -> Iterator[tuple[str, str]]:
        """Where in the study a field of runs is changed, and the field."""
        named = {"changes": self.changes, **{f"fit.{i}": changes for i, changes in enumerate(self.fit)}}
        named |= {f"tasks.{label}": changes for label, changes in self.tasks.items()}
        named |= {f"arms.{label}": changes for label, changes in self.arms.items()}
        for key, levels in self.axes.items():
            named |= (
                {f"axes.{key}": {key: levels}} if is_field(key) else {f"axes.{key}.{n}": c for n, c in levels.items()}
            )
        return ((where, key) for where, changes in named.items() for key in changes)

    @model_validator(mode="after")
    def _memory_can_be_fitted(self) -> Self:
        if self.fit and not any(budget.peak_memory for budget in self.budgets):
            raise ValueError("fit is for budgets with peak_memory, and none has one")
        return self


SETTLED = {
    "training.seed": "seeds",
    "training.steps": "budgets: [{steps: ...}]",
    "training.budget": "budgets",
    "training.checkpoint_every": "checkpoint_every",
    "training.save_model": "keep_models",
    "output": "the study's output",
}
"""Fields of a run file that a study decides, and where."""


def is_field(key: str) -> bool:
    """Whether an axis' key is a field of a run file, and not a name of the author's own."""
    return key == "schedule" or ("." in key and key.split(".")[0] in RunFile.model_fields)
