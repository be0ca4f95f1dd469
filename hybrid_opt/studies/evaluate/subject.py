"""Which models are evaluated, and on which rows, from the command line; no torch. Next: `measuring.py`.

One idea: whatever is named (a run, a model, a file of rows), it ends as models by label and sets of rows by label.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hybrid_opt.config.data import Data
from hybrid_opt.config.evaluation import RowSet
from hybrid_opt.config.explaining import validate
from hybrid_opt.config.foreign_code import Named, code_of_model, code_of_objective
from hybrid_opt.config.loading import load_run, recipes
from hybrid_opt.config.objectives import CausalLm
from hybrid_opt.config.run import Model, RunFile
from hybrid_opt.config.yaml_text import read_yaml
from hybrid_opt.errors import UserError
from hybrid_opt.recovery.ledger import PACKED

EVALUATED, BASE = "model", "base"
"""Labels of the model that is evaluated, and of the one that it is compared with."""
OWN, SECOND = "own", "second"
"""Labels of the rows that the model is made for, and of those on which it may have become worse."""
YAML = (".yaml", ".yml")
TEXT = "text"


@dataclass(frozen=True)
class Subject:
    """What is evaluated on what."""

    models: dict[str, Model]
    """By label, the base first."""
    sets: dict[str, RowSet]
    seed: int = 0
    """Decides a random model's weights, and which rows a fraction sets aside."""
    batch_size: int = 16
    """Examples in a forward pass."""
    device: str = "auto"
    named_by: Mapping[str, str] = field(default_factory=dict)
    """Options that named sets of rows, by their labels."""

    @contextmanager
    def naming(self, label: str) -> Iterator[None]:
        """Inside, errors about a set's rows begin with the option that named them."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.named_by[label]}: {error}" if label in self.named_by else str(error)) from None

    def code(self) -> list[Named]:
        """Code that evaluating would run."""
        named = [what for model in self.models.values() for what in code_of_model(model)]
        return named + [what for own in self.sets.values() for what in code_of_objective(own.objective, "objective")]


def subject(
    target: str,
    overrides: Sequence[str] = (),
    *,
    run: Path | None = None,
    data: str | None = None,
    second: str | None = None,
    text: str | None = None,
    base: str | None = None,
) -> Subject:
    """What the command line names.

    Args:
        target: a run folder, what `export` wrote, or a model's alias, folder or hub id.
        overrides: of the run file.
        run: the run file whose data and objective a model is evaluated by.
        data: other rows: whatever `data.train` may be, or a YAML file with `data` and `objective`.
        second: likewise, for the second set; rows are plain text.
        text: the column that rows of `data` and `second` have their text in.
        base: another base than what the run started from; `none`: none.

    Raises:
        UserError: what is named does not exist, does not fit together, or says too little.
    """
    folder, found = Path(target), None
    if run is not None:
        found = load_run(run, overrides)
    elif (folder / "run.yaml").is_file():
        found = load_run(folder / "run.yaml", overrides)
    elif overrides:
        raise UserError(
            f"command line: {overrides[0]} replaces a value of a run file, and {target} is no run folder; add --run RUN.yaml"
        )
    model, start = _models(target, folder, found)
    if base is not None:
        start = None if base == "none" else Model(name=base, dtype=model.dtype)
    sets = {OWN: _given(data, text, found) if data else _own(target, found)}
    if second is not None:
        sets[SECOND] = _given(second, text or TEXT, found)
    models = {**({BASE: start} if start else {}), EVALUATED: model}
    named_by = ({OWN: "--data"} if data else {}) | ({SECOND: "--forgetting"} if second else {})
    if found is None:
        return Subject(models, sets, named_by=named_by)
    training, device = found.training, getattr(found.engine, "device", "auto")
    return Subject(models, sets, training.seed, training.evaluation_batch_size, device, named_by)


def _models(target: str, folder: Path, run: RunFile | None) -> tuple[Model, Model | None]:
    """The model to evaluate, and what it started from, as far as that is known."""
    if not (folder / "run.yaml").is_file():
        if target in recipes() or folder.suffix in YAML:
            raise UserError(
                f"command line: {target} is neither a run folder nor a model; give a run's output folder, or a model with --run {target}"
            )
        return Model(name=target, dtype=run.model.dtype if run else "float32"), None
    own = load_run(folder / "run.yaml")
    if (folder / PACKED).is_file():
        return own.model.model_copy(update={"name": target, "config": None, "tokenizer": None}), own.model
    if not (folder / "model" / "config.json").is_file():
        raise UserError(
            f"{target}: it has no model/, so the run has not finished, or keeps none (training.save_model); go on with it by --resume, or write the "
            f"model of a step by hybrid-opt replay {target} --to-step N --output FOLDER"
        )
    tuned = {"name": str(folder / "model"), "config": None, "tokenizer": None, "revision": None}
    return own.model.model_copy(update=tuned), own.model


def _own(target: str, run: RunFile | None) -> RowSet:
    """A run's held-out rows."""
    if run is None:
        raise UserError(
            f"command line: nothing says what {target} is to be evaluated on; add --data rows.jsonl (and --text COLUMN), --data rows.yaml with "
            "sections data and objective, or --run RUN.yaml"
        )
    if run.data.validation is None:
        raise UserError(
            "data.validation: the run has no held-out rows; add data.validation=FILE (or a fraction, as 0.1), or --data FILE"
        )
    return RowSet(data=run.data, objective=run.objective)


def _given(source: str, text: str | None, run: RunFile | None) -> RowSet:
    """Rows named on the command line."""
    if Path(source).suffix in YAML:
        return validate(RowSet, read_yaml(Path(source)), lambda loc: (source, loc))
    if text is None and run is not None:
        own = {"train": source, "validation": None, "split": "train", "subset": None}
        return RowSet(data=run.data.model_copy(update=own), objective=run.objective)
    longest = run.data.max_tokens if run else 512
    return RowSet(data=Data(train=source, text=text or TEXT, max_tokens=longest), objective=CausalLm(type="causal_lm"))
