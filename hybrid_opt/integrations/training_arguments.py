"""What `TrainingArguments` mean for a schedule and an engine. Next: `transformers.py`.

One idea: the schedule file says how every estimator steps, and an argument that a user has changed says it of backprop instead, as an override on
the command line would. transformers does not tell which arguments were written, so one that has its default counts as left alone.
"""

from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments

from hybrid_opt.config.engines import ZeroEngine
from hybrid_opt.config.estimators import FIRST_MOMENTS
from hybrid_opt.config.loading import load_schedule
from hybrid_opt.config.schedule import ScheduleFile
from hybrid_opt.engines.deepspeed_config import DeepSpeedSettings
from hybrid_opt.errors import UserError

OPTIMIZERS = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "sgd": "SGD",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "adafactor": "Adafactor",
}
"""transformers' names of optimizers that torch has too."""
OF_BACKPROP = {
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "learning_rate_schedule",
    "warmup_steps": "warmup_steps",
    "max_grad_norm": "gradient_clipping",
    "optim": "optimizer",
    "weight_decay": "optimizer_arguments.weight_decay",
    "adam_beta1": "optimizer_arguments.betas",
    "adam_beta2": "optimizer_arguments.betas",
    "adam_epsilon": "optimizer_arguments.eps",
}
"""Arguments that speak of the optimizer, and where a schedule file says the same of an estimator."""
REFUSED = {
    "optim_args": "the schedule file has optimizer_arguments",
    "optim_target_modules": "the schedule file's policy says what backprop moves",
    "lr_scheduler_kwargs": "the schedules of learning rates have none here; leave it out",
    "auto_find_batch_size": "it would begin the run anew; pass memory_budget=, which fits the run into memory as it goes",
    "torch_compile": "estimators watch the modules' own calls, which a compiled model no longer makes; leave it out",
    "fsdp": "weights are spread by DeepSpeed here; pass deepspeed= with ZeRO stage 3",
    "parallelism_config": "weights are spread by DeepSpeed here; pass deepspeed= with ZeRO stage 3",
}
"""Arguments that cannot be followed, and what to do instead."""


def with_arguments(schedule: ScheduleFile, args: TrainingArguments, steps: int | None = None) -> ScheduleFile:
    """The schedule file with what the arguments say of backprop.

    Args:
        steps: of the run, of which a warm-up below 1 is a share.

    Raises:
        UserError: an argument that cannot be followed, or one about the optimizer where the schedule has none.
    """
    changed = {name for name in (*OF_BACKPROP, *REFUSED) if _is_changed(args, name)}
    for name in REFUSED:
        if name in changed:
            raise UserError(f"TrainingArguments: {name}: {REFUSED[name]}")
    if args.fp16 and not args.deepspeed:
        raise UserError(
            "TrainingArguments: fp16: float16 needs its losses scaled, which only DeepSpeed does here; write bf16=True"
        )
    name, told = schedule.backprop_name, changed & OF_BACKPROP.keys()
    if name is None:
        if told:
            first = min(told)
            raise UserError(
                f"TrainingArguments: {first}: this schedule has no backprop, of which it would speak; leave it out, and write "
                f"{OF_BACKPROP[first]} of the schedule's own estimators ({', '.join(schedule.estimators)})"
            )
        return schedule
    document = schedule.model_dump(mode="json", exclude_unset=True)
    own = document["estimators"][name]
    own |= _options(args, told, own, steps)
    if not {"micro_batch_size", "accumulation"} & own.keys() and not args.deepspeed:
        own["micro_batch_size"] = args.per_device_train_batch_size
    return load_schedule(document)


def _is_changed(args: TrainingArguments, name: str) -> bool:
    """Whether an argument has another value than its default."""
    field = next((field for field in fields(args) if field.name == name), None)
    if field is None:  # of another version of transformers
        return False
    default = field.default if field.default_factory is MISSING else field.default_factory()
    value = getattr(args, name)
    return bool(value or default) and value != default


def _options(args: TrainingArguments, told: set[str], own: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """What the arguments that were changed say, as options of the backprop estimator.

    Args:
        own: the estimator's options in the schedule file.
    """
    found: dict[str, Any] = {}
    if "learning_rate" in told:
        found["learning_rate"] = args.learning_rate
    if "lr_scheduler_type" in told:
        found["learning_rate_schedule"] = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if "warmup_steps" in told:
        if (
            own.get("learning_rate_schedule", "constant") == "constant"
        ):  # without a warm-up; the arguments' default is linear
            found.setdefault(
                "learning_rate_schedule", str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
            )
        found["warmup_steps"] = args.get_warmup_steps(steps) if steps else int(args.warmup_steps)
    if "max_grad_norm" in told:
        found["gradient_clipping"] = args.max_grad_norm or None
    if "optim" in told:
        optim = str(getattr(args.optim, "value", args.optim))
        if optim not in OPTIMIZERS:
            raise UserError(
                f"TrainingArguments: optim: {optim!r} is not one of {', '.join(OPTIMIZERS)}; choose one of them"
            )
        found["optimizer"] = OPTIMIZERS[optim]
    optimizer = found.get("optimizer") or own.get("optimizer", "AdamW")
    if (adam := sorted(name for name in told if name.startswith("adam_"))) and optimizer not in FIRST_MOMENTS:
        raise UserError(
            f"TrainingArguments: {adam[0]}: backprop's optimizer is {optimizer}, which has no such option; leave it out"
        )
    arguments = dict(own.get("optimizer_arguments", {}))
    if "weight_decay" in told:
        arguments["weight_decay"] = args.weight_decay
    if {"adam_beta1", "adam_beta2"} & told:
        arguments["betas"] = [args.adam_beta1, args.adam_beta2]
    if "adam_epsilon" in told:
        arguments["eps"] = args.adam_epsilon
    return found | ({"optimizer_arguments": arguments} if arguments else {})


def engine_of(args: TrainingArguments) -> ZeroEngine | None:
    """Where the weights live: under ZeRO where `deepspeed=` says so, else where the model is (None).

    Raises:
        UserError: several processes or devices without DeepSpeed, or ZeRO's stage 0.
    """
    if not args.deepspeed:
        if args.world_size > 1:
            raise UserError(
                f"TrainingArguments: the launcher started {args.world_size} processes, whose estimates are combined under DeepSpeed alone; pass "
                "deepspeed={'zero_optimization': {'stage': 2}}"
            )
        if args.n_gpu > 1:
            raise UserError(
                f"TrainingArguments: {args.n_gpu} devices are visible to one process; launch one for each (deepspeed, torchrun) with deepspeed=, or "
                "set CUDA_VISIBLE_DEVICES to one"
            )
        return None
    file = DeepSpeedSettings(ZeroEngine(type="zero", zero_stage=1, deepspeed_config=args.deepspeed)).file
    stage = file.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(
            f"TrainingArguments: deepspeed: zero_optimization.stage is {stage}, which keeps no float32 master of the weights; write 1, 2 or 3"
        )
    return ZeroEngine(
        type="zero",
        zero_stage=stage,
        deepspeed_config=args.deepspeed,
        micro_batch_size=args.per_device_train_batch_size,
        bf16=args.bf16 or None,
        fp16=args.fp16 or None,
    )
