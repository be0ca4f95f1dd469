"""From the `data` and `objective` sections of a run file to examples and batches, for the run and for estimators with their own. Next: `build.py`.

One idea: rows become examples and examples batches by one small protocol, whatever is minimised.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from datasets import Dataset

from hybrid_opt.config.by_length import ByLength
from hybrid_opt.config.data import Data
from hybrid_opt.config.objectives import CausalLm, Choice, Function
from hybrid_opt.config.objectives import Objective as ObjectiveConfig
from hybrid_opt.config.rewards import Reward
from hybrid_opt.config.run import RunFile
from hybrid_opt.errors import UserError
from hybrid_opt.objectives.batches import ShuffledBatches, hold_out
from hybrid_opt.objectives.causal_lm import CausalLmData, CausalLmObjective
from hybrid_opt.objectives.choice import ChoiceData
from hybrid_opt.objectives.contract import FunctionObjective, Objective, import_function
from hybrid_opt.objectives.data import load_splits
from hybrid_opt.objectives.reward import reward_objective
from hybrid_opt.training.lengths import by_length


class ExampleData(Protocol):
    """Turns rows into examples, and examples into batches for an objective."""

    def encode(self, rows: Dataset) -> Sequence[Any]:
        """Examples from rows."""
        ...

    def collate(self, examples: Sequence[Any]) -> Any:
        """A batch from examples."""
        ...


def objective_of(objective: ObjectiveConfig, config: Data, tokenizer: Any) -> tuple[Objective, ExampleData]:
    """What a section of a run file minimises, and how it makes examples of rows."""
    match objective:
        case Choice():
            data = ChoiceData(config, tokenizer)
            return data.objective, data
        case Function():
            function = import_function(objective.function)
            return FunctionObjective(function, objective.differentiable), CausalLmData(config, tokenizer)
        case Reward():
            return reward_objective(objective, config, tokenizer)
        case CausalLm():
            return CausalLmObjective(), CausalLmData(config, tokenizer)


def examples_of(
    config: Data, data: ExampleData, splits: tuple[Dataset, Dataset | None], seed: int
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Examples to train on, and held-out ones, from the rows of both."""
    rows, held_out_rows = splits
    examples = _encode(data, rows, config.train)
    if isinstance(config.validation, float):
        return hold_out(examples, config.validation, seed, at_end=config.text is not None)
    return examples, _encode(data, held_out_rows, config.validation) if held_out_rows is not None else []


def own_batches(
    run: RunFile, objective: Objective, data: ExampleData, examples: Sequence[Any], rows: Dataset, tokenizer: Any
) -> dict[str, tuple[Objective, ShuffledBatches]]:
    """For estimators that do not see the run's own batches: what they minimise, and their batches.

    Args:
        objective, data, examples: the run's own.
        rows: the training rows of its own data, before a fraction is set aside.
    """
    schedule, seed = run.schedule.schedule, run.training.seed
    own = {name: (*own_data(run, name, rows, tokenizer),) for name in run.objectives}
    if isinstance(schedule, ByLength):
        for name in schedule.weights:
            aim, kind, some = own.get(name, (objective, data, examples))
            own[name] = (aim, kind, by_length(schedule, some)[name])
    return {
        name: (aim, ShuffledBatches(some, run.batch_size_of(name), kind.collate, seed))
        for name, (aim, kind, some) in own.items()
    }


def own_data(
    run: RunFile, name: str, run_rows: Dataset, tokenizer: Any
) -> tuple[Objective, ExampleData, Sequence[Any]]:
    """What an estimator minimises instead, with its examples; of the run's own data it sees the same training rows."""
    own = run.objectives[name]
    config = own.data or run.data
    try:
        objective, data = objective_of(own.objective, config, tokenizer)
        rows = load_splits(own.data)[0] if own.data else run_rows
        examples, _ = examples_of(config, data, (rows, None), run.training.seed)  # nobody evaluates it
    except UserError as error:
        raise UserError(f"objectives.{name}: {error}") from None
    return objective, data, examples


def _encode(data: ExampleData, rows: Dataset, source: str) -> Sequence[Any]:
    try:
        return data.encode(rows)
    except UserError as error:
        raise UserError(f"{error} (in {source})") from None
