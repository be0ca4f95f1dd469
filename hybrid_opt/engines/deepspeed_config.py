"""From a run's settings to DeepSpeed's configuration; imports no deepspeed. Next: `zero.py`.

One idea: a setting may be written in several places (the schedule file, the `engine` section, a DeepSpeed file), because users
of DeepSpeed look for it in the last. Where two places say different things that is an error; nobody wins silently.
"""

import json
from pathlib import Path
from typing import Any

from hybrid_opt.config.engines import ZeroEngine
from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.yaml_text import read_text
from hybrid_opt.errors import UserError, did_you_mean

AUTO = "auto"
OFFLOADING = ("offload_optimizer", "offload_param")
ELSEWHERE = ("optimizer", "scheduler")
"""Sections of a DeepSpeed file that have their place in the schedule file instead."""
MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")
PASSED_ON = frozenset(
    (
        *("zero_optimization", "bf16", "fp16", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *(
            "prescale_gradients",
            "gradient_predivide_factor",
            "gradient_allreduce_op",
            "sparse_gradients",
            "disable_allgather",
        ),
        *("communication_data_type", "data_types", "activation_checkpointing", "aio", "disable_python_gc"),
        *(
            "steps_per_print",
            "wall_clock_breakdown",
            "memory_breakdown",
            "dump_state",
            "comms_logger",
            "flops_profiler",
            "timers",
        ),
    )
)
"""What a DeepSpeed file may say. Others write to folders of their own (monitors, autotuning), import what they name (compile,
torch_autocast), read pickles (checkpoint.load_universal), or have their place in the run file."""
BUCKET = 50_000_000
"""Values in a buffer for gradients on their way. DeepSpeed's own default, 500 million, takes 2 GB whatever the model's size."""

Place = tuple[str, Any]
"""Where a setting is written, and its value there."""


class DeepSpeedSettings:
    """What an `engine` section and its DeepSpeed file say together.

    Raises:
        UserError: the file cannot be read, or contradicts the section.
    """

    def __init__(self, engine: ZeroEngine) -> None:
        self.engine = engine
        self.file = _read(engine.deepspeed_config)

    def backprop(self, config: Backprop) -> Backprop:
        """The backprop estimator's configuration with what is said of it here.

        Raises:
            UserError: it says something else itself.
        """
        engine, own = self.engine, config.model_fields_set
        micro = self._one(
            ("engine.micro_batch_size", engine.micro_batch_size),
            self._in_file("train_micro_batch_size_per_gpu"),
            ("backprop's micro_batch_size", config.micro_batch_size),
        )
        accumulation = self._one(
            ("engine.gradient_accumulation_steps", engine.gradient_accumulation_steps),
            self._in_file("gradient_accumulation_steps"),
            ("backprop's accumulation", config.accumulation if "accumulation" in own else None),
        )
        clipping = self._one(
            ("engine.gradient_clipping", engine.gradient_clipping),
            self._in_file("gradient_clipping"),
            ("backprop's gradient_clipping", config.gradient_clipping if "gradient_clipping" in own else None),
        )
        return config.model_copy(
            update={
                "accumulation": accumulation or 1,
                "micro_batch_size": None
                if accumulation
                else micro,  # where both are given, check_batch_size compares them
                "gradient_clipping": clipping or None,
            }
        )

    def dtype(self, model: str, given: bool) -> str:
        """Type of the weights: `float32`, `bfloat16` or `float16`.

        Args:
            model: the model's.
            given: whether the user chose it.

        Raises:
            UserError: the choices contradict each other.
        """
        places = [("model.dtype", model if given else None)]
        for key, name in (("bf16", "bfloat16"), ("fp16", "float16")):
            for place, said in ((f"engine.{key}", getattr(self.engine, key)), self._in_file(f"{key}.enabled")):
                if said:
                    places.append((place, name))
                elif said is False and model == name and given:
                    places.append((place, "another type"))
        return self._one(*places) or model

    def offloads(self, *sections: str) -> bool:
        """Whether any of these sections (none: any at all) keeps something in main memory."""
        for section in sections or OFFLOADING:
            own, (_, said) = getattr(self.engine, section), self._in_file(f"zero_optimization.{section}.device")
            if "cpu" in (own and own.device, said):
                return True
        return False

    def check_batch_size(self, batch_size: int, ranks: int) -> None:
        """Whether a step's batch is the one that the DeepSpeed file speaks of.

        Raises:
            UserError: it is not.
        """
        self._one(("training.batch_size", batch_size), self._in_file("train_batch_size"))
        _, micro = self._in_file("train_micro_batch_size_per_gpu")
        micro = micro or self.engine.micro_batch_size
        _, passes = self._in_file("gradient_accumulation_steps")
        passes = passes or self.engine.gradient_accumulation_steps
        if micro and passes and micro * passes * ranks != batch_size:
            raise UserError(
                f"engine: {ranks} ranks with {passes} backward passes of {micro} examples make a batch of {micro * passes * ranks}, "
                f'but training.batch_size is {batch_size}; make them equal, or leave one of them out ("auto")'
            )

    def deepspeed(self, backprop: Backprop, dtype: str, ranks: int, hidden_size: int | None = None) -> dict[str, Any]:
        """The whole of DeepSpeed's configuration.

        Args:
            backprop: what `backprop` gave.
            dtype: what `dtype` gave.
            hidden_size: the model's, for `auto` sizes of buffers; None: it has none.
        """
        config = json.loads(json.dumps(self.file))
        zero = config.setdefault("zero_optimization", {})
        zero["stage"] = self._one(
            ("engine.zero_stage", self.engine.zero_stage), self._in_file("zero_optimization.stage")
        )
        for section in OFFLOADING:
            for field, value in getattr(self.engine, section) or {}:
                key = f"zero_optimization.{section}.{field}"
                said = self._one((f"engine.{section}.{field}", value), self._in_file(key))
                zero[section] = {**(zero.get(section) or {}), field: said}
        for key, name in (("bf16", "bfloat16"), ("fp16", "float16")):
            config.setdefault(key, {})["enabled"] = dtype == name
        for key, size in _sizes(hidden_size).items():
            if zero.get(key) == AUTO:
                zero[key] = size
        for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size"):
            zero.setdefault(key, BUCKET)
        # How a batch is cut is decided step by step and told to DeepSpeed pass by pass, so its own arithmetic gets ones.
        config |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": backprop.accumulation,
            "train_batch_size": backprop.accumulation * ranks,
            "gradient_clipping": backprop.gradient_clipping or 0.0,
            "zero_allow_untested_optimizer": True,
        }
        config.setdefault("zero_force_ds_cpu_optimizer", False)
        return _without_auto(config)

    def _in_file(self, key: str) -> Place:
        """What the DeepSpeed file says of a key; None if nothing or `auto`."""
        value: Any = self.file
        for part in key.split("."):
            value = value.get(part, AUTO) if isinstance(value, dict) else AUTO
        return f"{_name(self.engine.deepspeed_config)}: {key}", None if value == AUTO else value

    def _one(self, *places: Place) -> Any:
        """The one value that is given; None if none is."""
        given = [(place, value) for place, value in places if value is not None]
        for place, value in given[1:]:
            if value != given[0][1]:
                raise UserError(
                    f"engine: {given[0][0]} is {json.dumps(given[0][1])}, but {place} is {json.dumps(value)}; make them equal, or "
                    'leave one of them out (in a DeepSpeed file: "auto")'
                )
        return given[0][1] if given else None


def _name(source: str | dict[str, Any] | None) -> str:
    return source if isinstance(source, str) else "deepspeed_config"


def _read(source: str | dict[str, Any] | None) -> dict[str, Any]:
    if source is None:
        return {}
    where = f"engine.deepspeed_config: {source}" if isinstance(source, str) else "engine.deepspeed_config"
    try:
        content = json.loads(read_text(Path(source)) if isinstance(source, str) else json.dumps(source))
    except UserError as error:
        raise UserError(f"engine.deepspeed_config: {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(content).__name__}")
    for key in ELSEWHERE:
        if content.pop(key, AUTO) != AUTO:
            raise UserError(
                f"{where}: {key} belongs to the backprop estimator (optimizer, optimizer_arguments, "
                'learning_rate, learning_rate_schedule, warmup_steps); remove it, or write "auto"'
            )
    for section in ("zero_optimization", "bf16", "fp16", "flops_profiler"):
        if not isinstance(content.get(section, {}), dict):
            raise UserError(f"{where}: {section} must hold keys and values")
    _refuse_elsewhere(content, where)
    offloads = {key: content.get("zero_optimization", {}).get(key) or {} for key in OFFLOADING}
    for key, offload in offloads.items():
        if not isinstance(offload, dict):
            raise UserError(f"{where}: zero_optimization.{key} must hold keys and values")
    # An nvme_path beside another device is not looked at.
    if any(offload.get("device") == "nvme" for offload in offloads.values()):
        raise UserError(
            f"{where}: offloading to nvme is not supported, because ES steps write the weights where "
            "they lie; write cpu"
        )
    return content


def _refuse_elsewhere(content: dict[str, Any], where: str) -> None:
    for key in content:
        if key in MONITORS:
            raise UserError(
                f"{where}: {key} would write outside the run's folder; remove it, and write report_to in the run file"
            )
        if key not in PASSED_ON:
            raise UserError(
                f"{where}: {key} is not among the sections that are passed on to DeepSpeed{did_you_mean(key, PASSED_ON)}; remove it "
                f"(passed on: {', '.join(sorted(PASSED_ON))})"
            )
    if content.get("flops_profiler", {}).get("output_file") is not None:
        raise UserError(
            f"{where}: flops_profiler.output_file would write outside the run's folder; remove it, and the profile is printed"
        )


def _sizes(hidden_size: int | None) -> dict[str, int]:
    """What `auto` means for the sizes of buffers and of parameters that stay whole, as in transformers' own integration."""
    if hidden_size is None:
        return {"reduce_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET}
    return {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def _without_auto(config: Any) -> Any:
    """What is still `auto` is left to DeepSpeed's defaults."""
    if isinstance(config, dict):
        return {key: _without_auto(value) for key, value in config.items() if value != AUTO}
    return config
