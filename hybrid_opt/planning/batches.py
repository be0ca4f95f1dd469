"""The largest batches that a run's estimators may see. Next: `prediction.py`."""

from hybrid_opt.config.by_length import ByLength
from hybrid_opt.config.rewards import Reward
from hybrid_opt.config.run import RunFile
from hybrid_opt.config.schedule import acting_names
from hybrid_opt.models.loading import load_tokenizer
from hybrid_opt.objectives.batches import ShuffledBatches
from hybrid_opt.objectives.data import load_splits
from hybrid_opt.planning.prediction import Batch
from hybrid_opt.training.run_data import examples_of, objective_of, own_batches


def largest_batches(run: RunFile) -> dict[str, Batch]:
    """Of each estimator that acts and minimises a loss; what writes completions (a reward) is left out.

    Where `length_threshold: auto` is yet to be found, both sides are given the longest examples.

    Raises:
        UserError: data that cannot be read, or do not suit the objective.
    """
    schedule = run.schedule.schedule
    if isinstance(schedule, ByLength) and schedule.length_threshold == "auto":
        blend = {"type": "blend", "weights": schedule.weights}
        run = run.model_copy(
            update={"schedule": type(run.schedule)(**{**run.schedule.model_dump(), "schedule": blend})}
        )
    tokenizer, splits = load_tokenizer(run.model), load_splits(run.data)
    objective, data = objective_of(run.objective, run.data, tokenizer)
    examples, _ = examples_of(run.data, data, splits, run.training.seed)
    own = own_batches(run, objective, data, examples, splits[0], tokenizer)
    found = {}
    for name in acting_names(run.schedule.schedule):
        evaluates = run.schedule.estimators[name].forwards_a_step
        if evaluates and not isinstance(run.objective_of(name), Reward):
            everything = ShuffledBatches(examples, run.batch_size_of(name), data.collate, run.training.seed)
            aim, batches = own.get(name, (objective, everything))
            found[name] = Batch(aim, batches.largest())
    return found
