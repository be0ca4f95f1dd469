"""hybrid_opt: fine-tune language models by mixing evolution strategies with occasional backprop steps.

The public names, imported when first used, so that the command line starts at once. Reading route: `cli/`, `config/`,
`training/build.py`, `training/hybrid_optimizer.py`, `estimators/`, `perturbations/`, `noise/`, `engines/`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid_opt.config import RunFile, ScheduleFile, load_run, load_schedule
    from hybrid_opt.config.data import Data
    from hybrid_opt.config.rewards import Generation
    from hybrid_opt.engines.contract import Contribution, Engine, Shard
    from hybrid_opt.engines.local import LocalEngine
    from hybrid_opt.errors import UserError
    from hybrid_opt.estimators.backprop import BackpropEstimator
    from hybrid_opt.estimators.contract import Cost, Estimate, Estimator, WeightedSum
    from hybrid_opt.estimators.es import EsEstimator
    from hybrid_opt.models.loading import load_model, load_tokenizer
    from hybrid_opt.noise.keys import Key, StepKey
    from hybrid_opt.objectives.contract import FunctionObjective, Objective
    from hybrid_opt.objectives.judging import Judge
    from hybrid_opt.objectives.reward import RewardData, RewardObjective
    from hybrid_opt.run_files.summary import Summary
    from hybrid_opt.scheduling.policy import Policy
    from hybrid_opt.scheduling.schedule import Schedule
    from hybrid_opt.scheduling.signals import Signals
    from hybrid_opt.training.build import build
    from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
    from hybrid_opt.training.step_report import StepReport
    from hybrid_opt.training.trainer import Trainer

_HOMES = {
    "config": ("RunFile", "ScheduleFile", "load_run", "load_schedule"),
    "config.data": ("Data",),
    "config.rewards": ("Generation",),
    "engines.contract": ("Contribution", "Engine", "Shard"),
    "engines.local": ("LocalEngine",),
    "errors": ("UserError",),
    "estimators.backprop": ("BackpropEstimator",),
    "estimators.contract": ("Cost", "Estimate", "Estimator", "WeightedSum"),
    "estimators.es": ("EsEstimator",),
    "noise.keys": ("Key", "StepKey"),
    "models.loading": ("load_model", "load_tokenizer"),
    "objectives.contract": ("FunctionObjective", "Objective"),
    "objectives.judging": ("Judge",),
    "objectives.reward": ("RewardData", "RewardObjective"),
    "scheduling.policy": ("Policy",),
    "scheduling.schedule": ("Schedule",),
    "scheduling.signals": ("Signals",),
    "training.build": ("build",),
    "training.hybrid_optimizer": ("HybridOptimizer",),
    "training.step_report": ("StepReport",),
    "training.summary": ("Summary",),
    "training.trainer": ("Trainer",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BackpropEstimator",
    "Contribution",
    "Cost",
    "Data",
    "Engine",
    "EsEstimator",
    "Estimate",
    "Estimator",
    "FunctionObjective",
    "Generation",
    "HybridOptimizer",
    "Judge",
    "Key",
    "LocalEngine",
    "Objective",
    "Policy",
    "RewardData",
    "RewardObjective",
    "RunFile",
    "Schedule",
    "ScheduleFile",
    "Shard",
    "Signals",
    "StepKey",
    "StepReport",
    "Summary",
    "Trainer",
    "UserError",
    "WeightedSum",
    "build",
    "load_model",
    "load_run",
    "load_schedule",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hybrid_opt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hybrid_opt.{_HOME[name]}"), name)
