"""What a run file may say: model, data, objective, training, engine, and the schedule file to use.

One idea: everything that decides the outcome of a run is in this one frozen object, whose resolved copy is written to
the run folder. Next: `loading.py`, which makes it from YAML files and command-line overrides.
"""

from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, field_validator, model_validator

from hybrid_opt.config.adaptive import Adaptive
from hybrid_opt.config.data import Data
from hybrid_opt.config.divergence import Divergence
from hybrid_opt.config.engines import Engine, LocalEngine, ZeroEngine
from hybrid_opt.config.estimators import StaleGradient
from hybrid_opt.config.keeping import Keeping
from hybrid_opt.config.objectives import CausalLm, Choice, Function, Objective
from hybrid_opt.config.probing import Probing
from hybrid_opt.config.reporting import INTEGRATIONS, reporters
from hybrid_opt.config.rewards import Reward
from hybrid_opt.config.schedule import ScheduleFile, acting_names
from hybrid_opt.config.strict import NonNegativeInt, PositiveFloat, PositiveInt, Strict, Text
from hybrid_opt.config.tasks import Task
from hybrid_opt.errors import did_you_mean


class Model(Strict):
    """A pretrained model by name, or any architecture from random weights by `config`."""

    name: str | None = None
    """The alias `smollm2-135m`, a Hugging Face hub id, or a local folder."""
    config: dict[str, Any] | None = None
    """Instead of a name: a transformers configuration such as `{model_type: llama, hidden_size: 64, ...}`; the weights
    start random, drawn from the run's seed."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; left out: the model's own. A model from `config` needs one."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights that the forward pass uses."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; it needs `--allow-code` too."""

    @model_validator(mode="after")
    def _one_origin(self):
        if (self.name is None) == (self.config is None):
            raise ValueError("a model needs either name (alias, hub id or folder) or config (random weights)")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs model_type, the architecture's name in transformers, such as 'llama'")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a model from config needs tokenizer, a hub id or a folder")
        return self


class Lora(Strict):
    """Low rank adapters through the peft library; the model's own weights stay frozen, unless `trains_base` says otherwise."""

    type: Literal["lora"] = "lora"
    r: PositiveInt = 8
    """Rank of the adapters."""
    lora_alpha: PositiveInt = 16
    """The adapters' output is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapters."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Modules that get adapters: `all-linear`, a regular expression, or a list of name endings."""
    trains_base: bool = False
    """Whether the model's own weights are trained as well, such as by es while backprop has the adapters."""


def refuse_unsuited_data(objective: Objective, data: Data, where: str = "") -> None:
    """Raise ValueError if the data lacks what an objective needs.

    Args:
        where: what comes before `data` in the keys of messages, such as `objectives.backprop.`.
    """
    if isinstance(objective, Choice) and not (data.prompt and data.completion and data.choices):
        raise ValueError(f"objective choice needs {where}data.prompt, data.completion and data.choices")
    if data.choices and isinstance(objective, CausalLm):
        raise ValueError(f"objective causal_lm does not use {where}data.choices; write choice, or drop data.choices")
    if data.chat and isinstance(objective, Choice):
        raise ValueError(f"objective choice does not use {where}data.chat; drop it")
    if isinstance(objective, Reward):
        if data.text is not None:
            raise ValueError(
                f"objective reward needs prompts to answer: write {where}data.prompt or messages, not text"
            )
    elif data.prompt is not None and data.completion is None:
        raise ValueError(f"objective {objective.type} needs {where}data.completion, which goes with data.prompt")


class OwnObjective(Strict):
    """What one estimator minimises instead of the run's objective."""

    objective: Objective
    """What it minimises."""
    data: Data | None = None
    """What it learns from; left out: the run's data."""
    batch_size: PositiveInt | None = None
    """Examples in its batch; left out: `training.batch_size`."""


class Budget(Strict):
    """What a run may spend in its steps (evaluations, probes and checkpoints are free); it ends with the first step that reaches it."""

    seconds: PositiveFloat | None = None
    """Time."""
    tokens: PositiveInt | None = None
    """Tokens that forward passes process, padding left out."""
    forward_equivalents: PositiveFloat | None = None
    """Computing, in forward passes over the whole batch: an ES member counts for the share of the batch that it sees, a
    backward pass for 2, with gradient checkpointing for 3."""

    @model_validator(mode="after")
    def _one_currency(self):
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("a budget is exactly one of seconds, tokens and forward_equivalents")
        return self

    def spent(self, amounts: Any) -> float:
        """The share of the budget that is spent, given totals by attributes of these names (such as Signals)."""
        ((name, limit),) = self.model_dump(exclude_none=True).items()
        return getattr(amounts, name) / limit


class Training(Keeping):
    """Length of the run and what happens along it."""

    steps: PositiveInt | None = None
    """Steps to take; with a budget, the most."""
    budget: Budget | None = None
    """What the run may spend, instead of a number of steps."""
    batch_size: PositiveInt = 8
    """Examples in a step's batch; every estimator that acts sees the same ones."""
    seed: NonNegativeInt = 0
    """Decides the order of the data, all noise, and random weights."""
    evaluate_every: NonNegativeInt = 0
    """Steps between evaluations on the validation rows; 0: only before and after."""
    evaluation_rows: PositiveInt | None = None
    """Validation rows to use for evaluations along the way (before and after use all of them)."""
    evaluation_batch_size: PositiveInt = 16
    """Examples in a forward pass of an evaluation."""
    probe_rows: NonNegativeInt = 32
    """Rows on which the loss is measured whenever other estimators take over, to tell what each one contributed; 0: do
    not measure."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: only when interrupted."""
    save_model: bool = True
    """Leave the final model in the run folder."""
    divergence: Divergence | None = None
    """What is done about a loss that grows; null: only one that is not finite ends the run."""
    check_drift_every: NonNegativeInt = 50
    """Steps in which every weight is compared once with what it was after the update before, so that nobody else writes weights
    unnoticed; each step looks at another part of them. 0: none is."""

    memory_budget: ByteSize | None = None
    """Such as `20GB`: before the first step it is measured with how many of the last layers backprop stays below that, in how small parts
    of the batch, and with gradient checkpointing or without; of the rest it keeps off, which so is other estimators' alone. On CUDA it is
    what torch allocates, elsewhere the whole process. Left out: what the policy and the estimators say."""

    @model_validator(mode="after")
    def _has_an_end(self):
        if self.steps is None and self.budget is None:
            raise ValueError("say how long to train: steps, or a budget such as {seconds: 600}")
        return self

    @model_validator(mode="after")
    def _knows_the_best(self):
        if self.divergence and self.divergence.needs_evaluations and not self.evaluate_every:
            raise ValueError(
                "divergence: rises_for and roll_back go by evaluations along the way; write evaluate_every, or loss_above alone"
            )
        return self


def _path_or_inline(schema: dict[str, Any]) -> None:
    """A run file may name its schedule file; the loader puts the file's content there before validation."""
    inline = schema["properties"]["schedule"]
    schema["properties"]["schedule"] = {
        "description": inline.pop("description", ""),
        "anyOf": [{"type": "string"}, inline],
    }


IntegrationName = Annotated[str, Field(json_schema_extra={"enum": ["none", *INTEGRATIONS]})]


class RunFile(Strict):
    """The whole of a run file."""

    model_config = {"json_schema_extra": _path_or_inline}

    model: Model
    """What is fine-tuned."""
    peft: Lora | None = None
    """Train adapters instead of the model's own weights."""
    data: Data
    """What it learns from."""
    objective: Objective
    """What is minimised."""
    objectives: dict[str, OwnObjective] = {}
    """What some estimators minimise instead, by their names in the schedule: `es` a reward, `backprop` a loss."""
    training: Training
    """For how long."""
    engine: Engine = LocalEngine(type="local")
    """Where the weights live."""
    schedule: ScheduleFile
    """A path, a shipped recipe's name, or a schedule file's content."""
    output: Text
    """Folder of the run: metrics, checkpoints, model, picture."""
    report_to: IntegrationName | tuple[IntegrationName, ...] = "none"
    """Experiment trackers to report to, by transformers' names for them: `tensorboard`, or `[tensorboard, wandb]`."""

    @field_validator("report_to")
    @classmethod
    def _names_integrations(cls, names):
        reporters(names)
        return names

    @model_validator(mode="after")
    def _objectives_suit_data(self):
        refuse_unsuited_data(self.objective, self.data)
        for name, own in self.objectives.items():
            refuse_unsuited_data(own.objective, own.data or self.data, f"objectives.{name}." if own.data else "")
            if own.data and isinstance(own.data.validation, (str, Task)):
                raise ValueError(
                    f"objectives.{name}.data.validation: only the run's own objective is evaluated; drop it"
                )
        return self

    @model_validator(mode="after")
    def _best_weights_can_be_told(self):
        divergence = self.training.divergence
        if divergence and divergence.needs_evaluations and self.data.validation is None:
            raise ValueError(
                "training.divergence: rises_for and roll_back go by the loss on held-out rows; write data.validation, or loss_above alone"
            )
        return self

    @model_validator(mode="after")
    def _objectives_have_estimators(self):
        for name in self.objectives:
            if name not in self.schedule.estimators:
                raise ValueError(
                    f"objectives names the estimator {name!r}, which the schedule does not define"
                    f"{did_you_mean(name, self.schedule.estimators)}; defined: {', '.join(self.schedule.estimators)}"
                )
            if isinstance(self.schedule.estimators[name], StaleGradient):
                raise ValueError(
                    f"objectives.{name}: a stale_gradient evaluates nothing, so it has no objective; drop it"
                )
        return self

    def objective_of(self, estimator: str) -> Objective:
        """What an estimator minimises."""
        return self.objectives[estimator].objective if estimator in self.objectives else self.objective

    def batch_size_of(self, estimator: str) -> int:
        """Examples in an estimator's batch."""
        own = self.objectives.get(estimator)
        return own.batch_size if own and own.batch_size else self.training.batch_size

    @model_validator(mode="after")
    def _precision_is_one(self):
        engine, given = self.engine, "dtype" in self.model.model_fields_set
        for key, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
            wanted = getattr(engine, key, None)
            if given and wanted is not None and wanted != (self.model.dtype == dtype):
                raise ValueError(
                    f"engine.{key} is {str(wanted).lower()}, but model.dtype is {self.model.dtype}; drop one of them"
                )
        return self

    @model_validator(mode="after")
    def _whole_copy_is_possible(self):
        for name, estimator in self.schedule.estimators.items() if isinstance(self.engine, ZeroEngine) else ():
            if (
                self.engine.zero_stage == 3
                and getattr(getattr(estimator, "perturbation", None), "backup", "") == "model"
            ):
                raise ValueError(
                    f"the estimator {name!r} keeps a copy of the whole model (backup: model), but zero_stage 3 spreads it over "
                    "the ranks; write backup: layer"
                )
        return self

    @model_validator(mode="after")
    def _rounding_suits_dtype(self):
        if self.engine.master_weights == "stochastic_rounding" and self.model.dtype == "float16":
            raise ValueError(
                "engine.master_weights stochastic_rounding rounds to bfloat16, but model.dtype is float16; write fp32, or "
                "dtype: bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _examples_suffice(self):
        for name, estimator in self.schedule.estimators.items():
            if not isinstance(estimator, Probing):
                continue
            groups = estimator.example_groups
            needed = groups * (estimator.examples_per_step or 1)
            if needed > self.batch_size_of(name):
                raise ValueError(
                    f"the estimator {name!r} needs {needed} different examples a step, but "
                    f"{f'objectives.{name}' if self.batch_size_of(name) != self.training.batch_size else 'training'}.batch_size is "
                    f"{self.batch_size_of(name)}; raise it to {needed}, or lower "
                    + ("population_size or examples_per_step" if groups > 1 else "examples_per_step")
                )
        return self

    @model_validator(mode="after")
    def _budget_is_spent(self):
        budget = self.training.budget
        counts_forwards = budget is not None and budget.seconds is None and self.training.steps is None
        if counts_forwards and (names := self.schedule.lasts_without_forwards(self.schedule.schedule)):
            raise ValueError(
                f"training.budget counts what forward passes take, but at the end {names} (stale_gradient) acts alone and makes "
                "none, so the run would not end; write training.steps too"
            )
        return self

    @model_validator(mode="after")
    def _blocks_are_measured(self):
        if isinstance(self.schedule.schedule, Adaptive) and not self.training.probe_rows:
            raise ValueError(
                "an adaptive schedule goes by the loss on probe rows; write training.probe_rows, such as 32"
            )
        return self

    @model_validator(mode="after")
    def _gradient_exists(self):
        for name, estimator in self.schedule.estimators.items():
            objective = self.objective_of(name)
            if not estimator.differentiates:
                continue
            if isinstance(objective, Function) and not objective.differentiable:
                raise ValueError(
                    f"objective.differentiable is false, but the estimator {name!r} is {estimator.type}, which needs a "
                    "gradient; use a schedule of es estimators alone"
                )
            if isinstance(objective, Reward) and name in acting_names(self.schedule.schedule):
                raise ValueError(
                    f"a reward has no gradient, but the estimator {name!r} is {estimator.type}; give it an objective of its own, such as "
                    f"objectives: {{{name}: {{objective: {{type: causal_lm}}}}}}, or use a schedule of es estimators alone"
                )
        return self
