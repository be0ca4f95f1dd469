"""What a run file may say about built-in tasks: `data.train: {task: arithmetic, rows: 2000}` in place of a file. Next: `run.py`.

One idea: a task is its options and a seed; the rows follow from them, so nothing has to be stored.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator
from typing_extensions import Self

from hybrid_opt.config.strict import NonNegativeInt, PositiveInt, Strict, Text

SplitName = Literal["train", "held_out", "all"]


def _written_once(signs: str) -> str:
    if not signs or len(set(signs)) < len(signs):
        raise ValueError(f"{signs!r} must hold at least one operator, each written once")
    return signs


class Task(Strict):
    """What every built-in task says: how many rows, from which seed, of which share of all questions."""

    rows: PositiveInt
    """Number of rows, all with different questions."""
    seed: NonNegativeInt = 0
    """Decides which questions, and their order."""
    split: SplitName | None = None
    """Which questions to draw from: a fixed hash of a question puts it into `train` or, one in five, into `held_out`,
    whatever seed and rows are, so the two never overlap; `all`: both. null: `train` under data.train, `held_out` under
    data.validation."""

    def __str__(self) -> str:
        said = {"task": None, **self.model_dump(include=self.model_fields_set)}
        return "{" + ", ".join(f"{key}: {value}" for key, value in said.items()) + "}"


def _operators(known: str) -> Any:
    def known_ones(signs: str) -> str:
        if unknown := set(signs) - set(known):
            raise ValueError(f"{min(unknown)!r} is no operator here; use some of {known}")
        return signs

    return Annotated[str, AfterValidator(_written_once), AfterValidator(known_ones)]


class Countdown(Task):
    """Reach a target from some numbers, each used once; every row can be solved. Columns: numbers, target, prompt, answer."""

    task: Literal["countdown"]
    """The task's name."""
    numbers: Annotated[PositiveInt, Field(ge=2, le=6)] = 4
    """How many numbers a row has."""
    largest: Annotated[PositiveInt, Field(le=9999)] = 99
    """Largest of them; the smallest is 1."""
    largest_target: Annotated[PositiveInt, Field(le=1_000_000)] = 100
    """Largest target; the smallest is 1."""
    operators: _operators("+-*/") = "+-*/"
    """Operators of the solutions that rows are made from. A model may use all four."""


class Arithmetic(Task):
    """Chains of whole numbers such as `3 + 5 - 2`. Columns: question, answer."""

    task: Literal["arithmetic"]
    """The task's name."""
    terms: Annotated[PositiveInt, Field(ge=2, le=10)] = 2
    """Numbers in a chain."""
    smallest: NonNegativeInt = 0
    """Smallest number in it."""
    largest: Annotated[PositiveInt, Field(le=999_999)] = 99
    """Largest number in it; 9 for one digit."""
    operators: _operators("+-*") = "+-"
    """Operators to choose from; `*` binds before `+` and `-`."""

    @model_validator(mode="after")
    def _numbers_exist(self) -> Self:
        if self.smallest > self.largest:
            raise ValueError(f"smallest {self.smallest} is above largest {self.largest}; swap them")
        return self


class Conciseness(Task):
    """Short questions with short reference answers, a few dozen of them. Columns: question, answer."""

    task: Literal["conciseness"]
    """The task's name."""
    rows: PositiveInt | None = None
    """Number of rows; null: all that the split has."""


class ReasoningGym(Task):
    """A task of the reasoning-gym package, by name. Columns: question, answer, entry (what its scorer needs, as JSON)."""

    task: Literal["reasoning_gym"]
    """The task's name here; `name` is its name there."""
    name: Text
    """A name in reasoning-gym, such as leg_counting."""
    options: dict[str, Any] = {}
    """Settings of that task, such as `{max_animals: 5}`."""

    @field_validator("options")
    @classmethod
    def _seed_and_size_have_one_place(cls, options: Any) -> Any:
        for key, home in (("seed", "seed"), ("size", "rows")):
            if key in options:
                raise ValueError(f"{key!r} belongs in {home}, beside options")
        return options


BuiltInTask = Annotated[Countdown | Arithmetic | Conciseness | ReasoningGym, Field(discriminator="task")]
