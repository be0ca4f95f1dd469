"""Which models are evaluated, and on which rows, from the command line. Next: `measuring.py`.

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
from hybrid_opt.recovery.checkpoint import checkpoints, step_of
from hybrid_opt.recovery.ledger import PACKED
from hybrid_opt.run_files.run_folder import RunFolder

EVALUATED, BASE = "model", "base"
"""Labels of the model that is evaluated, and of the one that it is compared with."""
OWN, SECOND = "own", "second"
"""Labels of the rows that the model is made for, and of those on which it may have become worse."""
YAML = (".yaml", ".yml")
TEXT = "text"


READ = (
    "data.",
    "data=",
    "objective.",
    "objective=",
    "engine.device=",
    "training.evaluation_batch_size=",
    "training.seed=",
)
"""What of a run file matters here; the seed decides which rows a fraction sets aside."""


@contextmanager
def _said(option: str | None) -> Iterator[None]:
    """Inside, errors begin with the option that led to them."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{option}: {error}" if option else str(error)) from None


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
    """Options that named sets of rows and models, by their labels."""

    @contextmanager
    def naming(self, label: str) -> Iterator[None]:
        """Inside, errors about a set of rows or a model begin with the option that named it."""
        with _said(self.named_by.get(label)):
            yield

    def described(self, label: str, model: str) -> dict[str, str]:
        """What a set of rows and a model are called, for the JSON file."""
        return {"rows_of": self.rows_of(label), "model_name": self.models[model].name or "random weights"}

    def rows_of(self, label: str) -> str:
        """What to call a set's rows: a file or a hub id, or a built-in task."""
        data = self.sets[label].data
        set_aside = isinstance(data.validation, float)
        source = data.train if set_aside or data.validation is None else data.validation
        return (source if isinstance(source, str) else source.task) + ", held out" * set_aside

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
    max_tokens: int | None = None,
) -> Subject:
    """What the command line names.

    Args:
        target: a run folder, what `export` wrote, or a model's alias, folder or hub id.
        overrides: of the run file.
        run: the run file (or the run's folder) whose data and objective a model is evaluated by.
        data: other rows: whatever `data.train` may be, or a YAML file with `data` and `objective`.
        second: likewise, for the second set; rows are plain text.
        text: the column that rows of `data` and `second` have their text in.
        base: another base than what the run started from: whatever `target` may be; `none`: none.
        max_tokens: longest example, and length of a block of plain text; None: as the rows' own section says.

    Raises:
        UserError: what is named does not exist, does not fit together, or says too little.
    """
    found = _run_file(target, overrides, run)
    model, start = _models(target, found)
    if base is not None:
        with _said("--base"):
            start = None if base == "none" else _models(base, None)[0].model_copy(update={"dtype": model.dtype})
    sets = {OWN: _given(data, text, found) if data else _own(target, found)}
    if second is not None:
        sets[SECOND] = _given(second, text or TEXT, found)
    if max_tokens is not None:
        sets = {
            label: own.model_copy(update={"data": own.data.model_copy(update={"max_tokens": max_tokens})})
            for label, own in sets.items()
        }
    models = {**({BASE: start} if start else {}), EVALUATED: model}
    named_by = {
        label: option
        for label, option, given in ((OWN, "--data", data), (SECOND, "--forgetting", second), (BASE, "--base", base))
        if given
    }
    if found is None:
        return Subject(models, sets, named_by=named_by)
    training, device = found.training, getattr(found.engine, "device", "auto")
    return Subject(models, sets, training.seed, training.evaluation_batch_size, device, named_by)


def _run_file(target: str, overrides: Sequence[str], run: Path | None) -> RunFile | None:
    """The run file by which is evaluated; None: there is none."""
    own = Path(target) / "run.yaml"
    if run is not None:
        own = run / "run.yaml" if run.is_dir() else run
    elif not own.is_file():
        if overrides:
            raise UserError(
                f"command line: {overrides[0]} replaces a value of a run file, and {target} is no run folder; add --run RUN.yaml"
            )
        return None
    for override in overrides:
        if not override.startswith(READ):
            raise UserError(
                f"command line: {override} has no effect on an evaluation, which reads {', '.join(dict.fromkeys(key[:-1] for key in READ))} of a run file; drop it "
                "(another model is the first argument, another base --base)"
            )
    return load_run(own, overrides)


def _models(target: str, by: RunFile | None) -> tuple[Model, Model | None]:
    """The model that is meant, and what it started from, as far as that is known.

    Args:
        by: the run file that a model is evaluated by, whose own model it may be a later state of.
    """
    folder = Path(target)
    if not (folder / "run.yaml").is_file():
        if target in recipes() or folder.suffix in YAML:
            raise UserError(
                f"command line: {target} is neither a run folder nor a model; give a run's output folder, or a model with --run {target}"
            )
        name = str(folder / "model") if (folder / "model" / "config.json").is_file() else target  # what replay writes
        start = by.model if by and by.model.name != name else None
        return Model(name=name, dtype=by.model.dtype if by else "float32"), start
    own = load_run(folder / "run.yaml")
    if (folder / PACKED).is_file():
        return own.model.model_copy(update={"name": target, "config": None, "tokenizer": None}), own.model
    if not (folder / "model" / "config.json").is_file():
        raise UserError(
            f"{target}: it has no model/, as its run has not finished or keeps none (training.save_model); {_way_to_a_model(folder)}"
        )
    tuned = {"name": str(folder / "model"), "config": None, "tokenizer": None, "revision": None}
    return own.model.model_copy(update=tuned), own.model


def _way_to_a_model(folder: Path) -> str:
    """How to evaluate a run that left no model yet."""
    step = step_of(saved[0]) if (saved := checkpoints(RunFolder(folder).checkpoints)) else None
    if step is None:
        return "it has no checkpoint either; let it go on"
    return (
        f"let it finish, or take the model of its latest checkpoint: hybrid-opt replay {folder} --to-step {step} --output FOLDER, then hybrid-opt "
        f"evaluate FOLDER --run {folder}"
    )


def _own(target: str, run: RunFile | None) -> RowSet:
    """A run's held-out rows."""
    if run is None:
        raise UserError(
            f"command line: {target} is no run folder (it has no run.yaml), so nothing says what it is to be evaluated on; add --data rows.jsonl (and --text COLUMN), --data rows.yaml with "
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
