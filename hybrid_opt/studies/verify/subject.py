"""Which model and data to measure on: a run file, or options on the command line; no torch. Next: `real_model.py`.

One idea: options are put into a run file's form, so that the same validation speaks.
"""

from collections.abc import Sequence
from pathlib import Path

from hybrid_opt.config.explaining import Source, validate
from hybrid_opt.config.loading import load_run_and_source
from hybrid_opt.config.run import RunFile
from hybrid_opt.errors import UserError

ESTIMATORS = {
    "es_low_rank": {"type": "es", "population_size": 32, "fitness_shaping": "none"},
    "spsa_dense": {"type": "spsa", "pairs": 16, "perturbation": {"type": "dense"}},
    "spsa_rademacher": {"type": "spsa", "pairs": 16, "perturbation": {"type": "dense", "distribution": "rademacher"}},
}
"""Measured on a model that is given without a run file."""


def subject(
    run: Path | None,
    overrides: Sequence[str],
    *,
    model: str | None,
    data: str | None,
    prompt: str | None,
    completion: str | None,
    text: str | None,
) -> tuple[RunFile, Source] | None:
    """What the command line names to measure on, and where each key of it was written; None: nothing.

    Raises:
        UserError: a run file and options together, options that lack something, or what a run file's validation refuses.
    """
    options = {"--model": model, "--data": data, "--prompt": prompt, "--completion": completion, "--text": text}
    given = [option for option, value in options.items() if value is not None]
    if run is not None and given:
        raise UserError(
            f"command line: {given[0]} is for measuring without a run file; drop it, or write model.name=... or data.train=... after "
            f"{run}"
        )
    if run is not None:
        return load_run_and_source(run, overrides, None)
    if not given:
        return None
    if model is None or data is None:
        raise UserError(
            f"command line: {given[0]} needs {'--model' if model is None else '--data'} too, such as --model smollm2-135m --data "
            "rows.jsonl --text text; or give a run file"
        )
    form = {"prompt": prompt, "completion": completion, "text": text}

    def source(keys: list[str]) -> tuple[str, list[str]]:
        return "command line", keys

    return validate(RunFile, _document(model, data, form), source), source


def _document(model: str, data: str, form: dict[str, str | None]) -> dict:
    estimators = {name: {"learning_rate": 1e-3, **options} for name, options in ESTIMATORS.items()}
    return {
        "model": {"name": model},
        "data": {"train": data, "max_tokens": 128, **{key: value for key, value in form.items() if value is not None}},
        "objective": {"type": "causal_lm"},
        "training": {"steps": 1, "batch_size": 8},
        "schedule": {
            "estimators": estimators,
            "schedule": {"type": "blend", "weights": dict.fromkeys(estimators, 1.0)},
        },
        "output": "verify",
    }
