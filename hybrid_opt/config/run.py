"""What a run file may say: model, data, objective, training, engine, and the schedule file to use.

One idea: everything that decides the outcome of a run is in this one frozen object, whose resolved copy is written to
the run folder. Next: `loading.py`, which makes it from YAML files and command-line overrides.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from hybrid_opt.config.adaptive import Adaptive
from hybrid_opt.config.by_length import ByLength
from hybrid_opt.config.data import Data
from hybrid_opt.config.engines import Engine, LocalEngine, ZeroEngine
from hybrid_opt.config.estimators import StaleGradient
from hybrid_opt.config.objectives import CausalLm, Choice, Function, Objective
from hybrid_opt.config.probing import Probing
from hybrid_opt.config.reporting import INTEGRATIONS, reporters
from hybrid_opt.config.rewards import Reward
from hybrid_opt.config.schedule import ScheduleFile, acting_names
from hybrid_opt.config.strict import PositiveInt, Strict, Text
from hybrid_opt.config.tasks import Task
from hybrid_opt.config.training import Training
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
    def _one_origin(self) -> Self:
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
    def _names_integrations(cls, names: Any) -> Any:
        reporters(names)
        return names

    @model_validator(mode="after")
    def _objectives_suit_data(self) -> Self:
        refuse_unsuited_data(self.objective, self.data)
        for name, own in self.objectives.items():
            refuse_unsuited_data(own.objective, own.data or self.data, f"objectives.{name}." if own.data else "")
            if own.data and isinstance(own.data.validation, (str, Task)):
                raise ValueError(
                    f"objectives.{name}.data.validation: only the run's own objective is evaluated; drop it"
                )
        return self

    @model_validator(mode="after")
    def _best_weights_can_be_told(self) -> Self:
        divergence = self.training.divergence
        if divergence and divergence.needs_evaluations and self.data.validation is None:
            raise ValueError(
                "training.divergence: rises_for and roll_back go by the loss on held-out rows; write data.validation, or loss_above alone"
            )
        return self

    @model_validator(mode="after")
    def _objectives_have_estimators(self) -> Self:
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
        own, schedule = self.objectives.get(estimator), self.schedule.schedule
        if isinstance(schedule, ByLength) and estimator == schedule.long and schedule.long_batch_size:
            return schedule.long_batch_size
        return own.batch_size if own and own.batch_size else self.training.batch_size

    @model_validator(mode="after")
    def _lengths_are_of_one_kind(self) -> Self:
        schedule = self.schedule.schedule
        if not isinstance(schedule, ByLength):
            return self
        for name in (schedule.long, schedule.short):
            if name in self.objectives and self.objectives[name].data:
                raise ValueError(
                    f"objectives.{name}.data: by_length deals the run's own data out by their length, so {name} cannot have others; drop it"
                )
        if schedule.length_threshold == "auto" and self.training.memory_budget is None:
            raise ValueError(
                "schedule.length_threshold: auto is the most that fits into a memory budget; write training.memory_budget: 20GB, or a number of tokens"
            )
        return self

    @model_validator(mode="after")
    def _memory_can_be_tried(self) -> Self:
        if self.training.memory_budget is not None and isinstance(self.engine, ZeroEngine):
            raise ValueError(
                "training.memory_budget: DeepSpeed lays out the memory of all that backprop may ever own before the first step, so nothing can be "
                "tried; give backprop fewer layers by the policy, or write engine: {type: local}"
            )
        return self

    @model_validator(mode="after")
    def _precision_is_one(self) -> Self:
        engine, given = self.engine, "dtype" in self.model.model_fields_set
        for key, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
            wanted = getattr(engine, key, None)
            if given and wanted is not None and wanted != (self.model.dtype == dtype):
                raise ValueError(
                    f"engine.{key} is {str(wanted).lower()}, but model.dtype is {self.model.dtype}; drop one of them"
                )
        return self

    @model_validator(mode="after")
    def _whole_copy_is_possible(self) -> Self:
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
    def _rounding_suits_dtype(self) -> Self:
        if self.engine.master_weights == "stochastic_rounding" and self.model.dtype == "float16":
            raise ValueError(
                "engine.master_weights stochastic_rounding rounds to bfloat16, but model.dtype is float16; write fp32, or "
                "dtype: bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _examples_suffice(self) -> Self:
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
    def _budget_is_spent(self) -> Self:
        budget = self.training.budget
        counts_forwards = budget is not None and budget.seconds is None and self.training.steps is None
        if counts_forwards and (names := self.schedule.lasts_without_forwards(self.schedule.schedule)):
            raise ValueError(
                f"training.budget counts what forward passes take, but at the end {names} (stale_gradient) acts alone and makes "
                "none, so the run would not end; write training.steps too"
            )
        return self

    @model_validator(mode="after")
    def _blocks_are_measured(self) -> Self:
        if isinstance(self.schedule.schedule, Adaptive) and not self.training.probe_rows:
            raise ValueError(
                "an adaptive schedule goes by the loss on probe rows; write training.probe_rows, such as 32"
            )
        return self

    @model_validator(mode="after")
    def _gradient_exists(self) -> Self:
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
