"""From a validated run file to a Trainer with model, data and objective. Next: `run_data.py`, `trainer.py`.

One idea: what is cheap to find wrong is found first, and nothing is written before everything is known to fit.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hybrid_opt.config.divergence import Divergence
from hybrid_opt.config.engines import ZeroEngine
from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.foreign_code import code_of, refuse_code
from hybrid_opt.config.keeping import Keeping
from hybrid_opt.config.loading import differences
from hybrid_opt.config.objectives import Objective as ObjectiveConfig
from hybrid_opt.config.perturbations import LowRankPerturbation
from hybrid_opt.config.probing import Probing
from hybrid_opt.config.reporting import refuse_missing_packages
from hybrid_opt.config.rewards import Reward
from hybrid_opt.config.run import Model, RunFile
from hybrid_opt.config.training import Budget
from hybrid_opt.display.progress import Display
from hybrid_opt.engines.build import refuse_many_processes
from hybrid_opt.engines.deepspeed_config import DeepSpeedSettings
from hybrid_opt.engines.ranks import launched_world_size
from hybrid_opt.errors import UserError
from hybrid_opt.models.loading import load_model, load_tokenizer
from hybrid_opt.objectives.batches import ShuffledBatches
from hybrid_opt.objectives.contract import Objective
from hybrid_opt.objectives.data import load_splits
from hybrid_opt.rollouts.adapters import refuse_what_adapters_cannot_carry
from hybrid_opt.run_files.run_folder import RunFolder
from hybrid_opt.scheduling.learning_rate import INDEPENDENT_OF_LENGTH
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from hybrid_opt.training.length_threshold import fitted, with_threshold
from hybrid_opt.training.refusals import TAMING
from hybrid_opt.training.run_data import ExampleData, examples_of, objective_of, own_batches, own_data
from hybrid_opt.training.trainer import Trainer


def build(
    run: RunFile,
    *,
    allow_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    display: Display | None = None,
) -> Trainer:
    """A Trainer for a run file, ready to train.

    Args:
        allow_code: run the code that the run file names: functions of the user's own (`module:function`), and what comes with a
            model (`trust_remote_code`).
        overwrite: replace the run that the output folder holds.
        resume: go on from the newest checkpoint there.
        display: what shows the progress; None: as `display_for` chooses.

    Raises:
        UserError: anything in the run file that does not fit the data, the model or the machine, or code that is not allowed.
    """
    refuse_code(code_of(run), allow_code)
    folder = RunFolder(run.output)
    folder.check(overwrite=overwrite, resume=resume)
    if overwrite:
        _refuse_to_lose_the_model(run)
    refuse_missing_packages(run.report_to)
    if resume:
        run = with_threshold(run, folder.read_config())
        refuse_changes(folder.read_config(), run)
    model_config = with_engine_dtype(run)
    splits = load_splits(run.data)
    tokenizer = load_tokenizer(run.model)
    objective, data = objective_of(run.objective, run.data, tokenizer)
    examples, held_out = examples_of(run.data, data, splits, run.training.seed)
    validation = _short_first(held_out)
    training, size = run.training, run.training.evaluation_batch_size
    model = load_model(model_config, run.peft, training.seed)
    refuse_what_does_not_fit(model, [*examples, *held_out], _most_new_tokens(run.objective))
    run, notes = _with_settled_lengths(run, model, objective, data, examples, splits[0], tokenizer)
    own = own_batches(run, objective, data, examples, splits[0], tokenizer)
    for _, batches in own.values():
        refuse_what_does_not_fit(model, batches.examples)
    trainer = Trainer(
        model,
        objective,
        ShuffledBatches(examples, training.batch_size, data.collate, training.seed),
        schedule=run.schedule,
        objectives=own,
        steps=training.steps,
        budget=training.budget,
        seed=training.seed,
        engine=run.engine,
        validation=_batches(validation, size, data),
        evaluate_every=training.evaluate_every,
        validation_along=_batches(spread(validation, training.evaluation_rows), size, data)
        if training.evaluation_rows
        else None,
        probe=_batches(spread(validation or examples, training.probe_rows), size, data),
        checkpoint_every=training.checkpoint_every,
        keeping=training,
        divergence=training.divergence,
        check_drift_every=training.check_drift_every,
        memory_budget=training.memory_budget,
        output=run.output,
        overwrite=overwrite,
        resume=resume,
        saves_model=training.save_model,
        tokenizer=tokenizer,
        config=run.model_dump(mode="json", exclude_none=True),
        display=display,
        report_to=run.report_to,
        notes=notes,
    )
    _refuse_what_vllm_cannot_serve(run, trainer.optimizer)
    return trainer


def with_engine_dtype(run: RunFile) -> Model:
    """The model's section with the dtype that the engine's settings ask for, which may have it from a DeepSpeed file."""
    if not isinstance(run.engine, ZeroEngine):
        refuse_many_processes()
        return run.model
    settings = DeepSpeedSettings(run.engine)
    for name in (name for name, e in run.schedule.estimators.items() if isinstance(e, Backprop)):
        settings.check_batch_size(run.batch_size_of(name), launched_world_size())
    dtype = settings.dtype(run.model.dtype, given="dtype" in run.model.model_fields_set)
    return run.model.model_copy(update={"dtype": dtype})


def _with_settled_lengths(
    run: RunFile,
    model: Any,
    objective: Objective,
    data: ExampleData,
    examples: Sequence[Any],
    rows: Dataset,
    tokenizer: Any,
) -> tuple[RunFile, list[str]]:
    """The run with a number for `length_threshold`, and what is to be said of that."""
    schedule = run.schedule.schedule
    if getattr(schedule, "length_threshold", None) != "auto":
        return run, []
    aim, kind, some = (
        own_data(run, schedule.short, rows, tokenizer)
        if schedule.short in run.objectives
        else (objective, data, examples)
    )
    run, words = fitted(run, model, aim, some, kind.collate)
    return run, [words]


def _refuse_to_lose_the_model(run: RunFile) -> None:
    for key, name in (("model.name", run.model.name), ("model.tokenizer", run.model.tokenizer)):
        if name and os.path.exists(name) and Path(name).resolve().is_relative_to(Path(run.output).resolve()):
            raise UserError(f"{key}: {name!r} lies in the output folder, which --overwrite would empty; choose another")


def refuse_what_does_not_fit(model: Any, examples: Sequence[Any], new_tokens: int = 0) -> None:
    """Token ids and lengths beyond the model's tables would end in an index error at some later step.

    Args:
        new_tokens: most tokens that are written after an example.

    Raises:
        UserError: naming the key to change.
    """
    rows = [[*example.prompt, *getattr(example, "completion", ())] for example in examples]
    table, longest = model.get_input_embeddings().num_embeddings, max(map(len, rows)) + new_tokens
    if (highest := max(map(max, rows))) >= table:
        raise UserError(
            f"model.config.vocab_size: the tokenizer gives token {highest}, but the model knows {table}; raise vocab_size, or "
            "use the tokenizer that belongs to the model"
        )
    if longest > (positions := getattr(model.config, "max_position_embeddings", None) or longest):
        raise UserError(
            f"data.max_tokens: an example has {longest} tokens, but the model has only {positions} positions; write "
            f"{positions} or fewer"
        )


def _refuse_what_vllm_cannot_serve(run: RunFile, optimizer: HybridOptimizer) -> None:
    for name, config in run.schedule.estimators.items():
        objective = run.objective_of(name)
        if isinstance(config, Probing) and isinstance(objective, Reward) and objective.generation.engine == "vllm":
            low_rank = isinstance(config.perturbation, LowRankPerturbation)
            for policy in optimizer.policies.values() if low_rank else ():
                if names := policy.names(name):
                    refuse_what_adapters_cannot_carry(optimizer.engine.model, names)


def refuse_changes(saved: dict[str, Any], run: RunFile) -> None:
    """A resumed run must be the run that was interrupted, but for how often it looks around and what tames it.

    Its length may change too, unless a learning rate's course depends on it.

    Raises:
        UserError: naming what differs.
    """
    now = run.model_dump(mode="json", exclude_none=True)
    free = {
        "output",
        "report_to",
        "training.evaluate_every",
        "training.checkpoint_every",
        "training.evaluation_rows",
        "training.save_model",
        "training.check_drift_every",
    }
    free |= {f"training.{key}" for key in Keeping.model_fields}
    free |= {f"training.divergence.{key}" for key in Divergence.model_fields}
    free |= {f"training.budget.{currency}" for currency in Budget.model_fields}
    if all(e.learning_rate_schedule in INDEPENDENT_OF_LENGTH for e in run.schedule.estimators.values()):
        free.add("training.steps")
    free |= {f"schedule.estimators.{name}.{field}" for name in run.schedule.estimators for field in TAMING}
    for key, before, after in differences(saved, now):
        if key not in free:
            raise UserError(
                f"output: {run.output}: cannot resume, because {key} was {before!r} and is now {after!r}; "
                "change it back, or start anew with --overwrite"
            )


def _most_new_tokens(objective: ObjectiveConfig) -> int:
    return objective.generation.max_new_tokens if isinstance(objective, Reward) else 0


def _short_first(examples: Sequence[Any]) -> list[Any]:
    """Sorted by length, so that batches for evaluation hold little padding."""
    return sorted(examples, key=lambda example: len(example.prompt))


def spread(examples: Sequence[Any], rows: int) -> list[Any]:
    """This many examples, at even distances (short ones and long ones, where they are sorted)."""
    rows = min(rows, len(examples))
    return [examples[i * len(examples) // rows] for i in range(rows)]


def _batches(examples: Sequence[Any], size: int, data: ExampleData) -> list[Any]:
    return [data.collate(examples[i : i + size]) for i in range(0, len(examples), size)]
