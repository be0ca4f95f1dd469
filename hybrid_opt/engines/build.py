"""The engine that a run asks for, told what may ever be moved by whom. Next: `../training/hybrid_optimizer.py`."""

from torch import nn

from hybrid_opt.config.engines import LocalEngine as LocalEngineConfig
from hybrid_opt.config.engines import ZeroEngine as ZeroEngineConfig
from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.schedule import ScheduleFile
from hybrid_opt.engines.contract import Engine
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.engines.ranks import launched_world_size
from hybrid_opt.errors import UserError
from hybrid_opt.scheduling.ownership import Ownership


def with_engine_settings(schedule: ScheduleFile, engine: LocalEngineConfig | ZeroEngineConfig | None) -> ScheduleFile:
    """The schedule file with what the `engine` section and its DeepSpeed file say about backprop.

    Raises:
        UserError: they contradict the schedule file.
    """
    if not isinstance(engine, ZeroEngineConfig):
        return schedule
    from hybrid_opt.engines.deepspeed_config import DeepSpeedSettings

    settings = DeepSpeedSettings(engine)
    estimators = {
        name: settings.backprop(config) if isinstance(config, Backprop) else config
        for name, config in schedule.estimators.items()
    }
    return schedule.model_copy(update={"estimators": estimators})


def build_engine(
    model: nn.Module,
    schedule: ScheduleFile,
    ownership: Ownership,
    config: LocalEngineConfig | ZeroEngineConfig | None,
    *,
    seed: int,
) -> Engine:
    """The engine, prepared for what backprop and what anybody may move in any phase.

    Args:
        config: the `engine` section; None: the model stays where it is.

    Raises:
        UserError: see `LocalEngine` and `ZeroEngine`.
    """
    policies = list(ownership.widest.values())
    name, backprop = schedule.backprop_name, schedule.backprop
    owned = [set(policy.names(name)) for policy in policies] if name else []
    movable = {parameter for policy in policies for parameter, who in policy.owners.items() if who}
    try:
        if isinstance(config, ZeroEngineConfig):
            from hybrid_opt.engines.zero import ZeroEngine

            apart = [layer & set().union(*owned) for layer in ownership.changing()]
            return ZeroEngine(model, backprop, [*owned, *apart], movable, config=config, seed=seed)
        refuse_many_processes()
        if config is None:
            device = next((p.device for p in model.parameters()), "cpu")
            config = LocalEngineConfig(type="local", device=str(device))
        settings = config.model_dump(exclude={"type"})
        return LocalEngine(model, backprop, set().union(*owned), movable, seed=seed, **settings)
    except UserError as error:
        said_of_optimizer = str(error).startswith("optimizer")
        raise UserError(f"estimators.{name}.{error}" if said_of_optimizer else str(error)) from None


def refuse_many_processes() -> None:
    """The local engine knows nothing of other processes: each would train a model of its own, in the same folder.

    Raises:
        UserError: the launcher has started several.
    """
    if (ranks := launched_world_size()) > 1:
        raise UserError(
            f"engine.type: local runs in one process, but the launcher started {ranks}; write engine: {{type: zero, zero_stage: 2}}"
        )
