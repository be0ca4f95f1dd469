"""Reports a run to experiment trackers through transformers' own callbacks. Next: `../config/reporting.py`, their names.

One idea: to a callback this is a transformers Trainer, with the same events in the same order. So whatever tracker transformers
supports works, and of the trackers themselves nothing is known here (but for where TensorBoard shall write).
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from hybrid_opt.config.loading import flat
from hybrid_opt.config.reporting import reporters
from hybrid_opt.errors import UserError
from hybrid_opt.run_files.metrics import TOTALS
from hybrid_opt.run_files.run_folder import RunFolder
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer

OF_A_STEP = (
    "loss",
    "reward",
    "loss_spread",
    "tokens",
    "seconds",
    "forwards",
    "backwards",
    "forward_equivalents",
    "peak_memory_bytes",
)
"""What is reported of each line of `metrics.jsonl`, beside what belongs to an estimator."""


class Trackers:
    """A `Display` that passes on what happens to the callbacks of transformers' integrations.

    A tracker that fails along the way is left out from there on: a run is not lost because a server is.

    Args:
        report_to: names as in a run file.
        folder: what callbacks write without being told where goes to its `logs`; its name is the run's.
        config: the run's configuration, which trackers show as its hyperparameters.
        model, tokenizer: for callbacks that ask for them.
        say: is told of a tracker's failure.

    Raises:
        UserError: a tracker's package is missing or cannot be used.
    """

    def __init__(
        self,
        report_to: str | Sequence[str],
        folder: RunFolder,
        config: Mapping[str, Any],
        model: nn.Module | None = None,
        tokenizer: Any = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.callbacks = {name: _callback(name) for name in reporters(report_to)}
        self.arguments = RunArguments(folder, config)
        self.state, self.control = TrainerState(logging_steps=1), TrainerControl()
        self.given = {"model": model, "processing_class": tokenizer}
        self.show = say
        self.starting = False

    def start(
        self,
        step: int,
        steps: int | None,
        metrics: Iterable[dict[str, Any]] = (),
        evaluations: Iterable[dict[str, Any]] = (),
    ) -> None:
        """The training begins, or goes on.

        Raises:
            UserError: a tracker does not start, for instance because nobody is logged in.
        """
        self.state.global_step, self.state.max_steps = step, steps or 0
        self.totals = dict.fromkeys(TOTALS, 0)
        for row in metrics:
            self._add(row)
        if isinstance(tensorboard := self.callbacks.get("tensorboard"), integration_utils.TensorBoardCallback):
            _open_tensorboard(tensorboard, self.arguments.output_dir, step)
        self.starting = True
        self._tell("on_init_end")
        self._tell("on_train_begin")
        self.starting = False

    def stepped(self, row: dict[str, Any], done: float) -> None:
        """Log a step's numbers."""
        self.state.global_step = row["step"] + 1
        self._add(row)
        self._tell("on_step_end")
        self._tell("on_log", logs=step_scalars(row) | {f"total_{name}": total for name, total in self.totals.items()})

    def _add(self, row: Mapping[str, Any]) -> None:
        self.totals = {name: total + row[name] for name, total in self.totals.items()}

    def evaluated(self, step: int, measures: dict[str, float]) -> None:
        """Log the measures, under the prefix that callbacks know evaluations by."""
        self.state.global_step = step
        metrics = {f"eval_{name}": value for name, value in measures.items()}
        self._tell("on_log", logs=metrics)
        self._tell("on_evaluate", metrics=metrics)

    def say(self, text: str) -> None:
        """Nothing: trackers keep numbers."""

    def stop(self) -> None:
        """The training ends, so callbacks close what they opened."""
        self.starting = False
        self._tell("on_train_end")

    def _tell(self, event: str, **what: Any) -> None:
        for name, callback in list(self.callbacks.items()):
            try:
                getattr(callback, event)(self.arguments, self.state, self.control, **self.given, **what)
            except Exception as error:  # each tracker has its own kinds
                del self.callbacks[name]
                if self.starting:
                    raise UserError(f"report_to: {name} does not start: {error}") from error
                self.show(f"report_to: {name} failed after {self.state.global_step} steps, and is left out: {error}")


def hyperparameters(config: Mapping[str, Any] | None, optimizer: HybridOptimizer, steps: int | None) -> dict[str, Any]:
    """What trackers show of a run's configuration, by dotted keys; of one that was built in Python, what is known."""
    schedule = optimizer.config.model_dump(mode="json")
    return dict(flat(config or {"steps": steps, "seed": optimizer.seed, "schedule": schedule}))


class RunArguments(TrainingArguments):
    """What callbacks ask of `TrainingArguments`: places, names, and as hyperparameters the run's own configuration.

    TrainingArguments would, when made, choose a device, reset accelerate's state and meet the other processes; here nothing is
    touched. The defaults of its fields (a learning rate of 5e-5, ...) are not this run's, so no tracker gets to see them.
    """

    def __init__(self, folder: RunFolder, config: Mapping[str, Any]) -> None:
        super().__init__(output_dir=str(folder.logs), run_name=folder.path.resolve().name)
        self.config = dict(config)

    def __post_init__(self) -> None:
        pass

    def to_dict(self) -> dict[str, Any]:
        """The configuration of the run, `{"training.steps": 16, ...}`."""
        return dict(self.config)


def step_scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of `metrics.jsonl` by name; those of an estimator begin with its name and a slash."""
    scalars = {name: row.get(name) for name in OF_A_STEP}
    for name, part in row["parts"].items():
        scalars[f"{name}/loss"] = row["losses"][name]
        scalars[f"{name}/weight"] = row["weights"][name]
        scalars[f"{name}/learning_rate"] = row["learning_rates"][name]
        scalars[f"{name}/seconds"] = part["seconds"]
        scalars |= {f"{name}/{statistic}": value for statistic, value in part["statistics"].items()}
    for who, layers in row["update_norms"].items():
        scalars[f"{who}/update_norm"] = sum(norm**2 for norm in layers.values()) ** 0.5
    return {name: value for name, value in scalars.items() if value is not None}


def _callback(name: str) -> TrainerCallback:
    known = integration_utils.INTEGRATION_TO_CALLBACK
    if name not in known:
        raise UserError(f"report_to: the installed transformers does not know {name}; it knows {', '.join(known)}")
    try:
        return known[name]()
    except (RuntimeError, ImportError) as error:
        raise UserError(f"report_to: {name} cannot be used: {error}") from error


def _open_tensorboard(callback: TrainerCallback, folder: str, step: int) -> None:
    """One folder for the whole run, resumed or not; steps that are taken again replace those from before."""
    from torch.utils.tensorboard import SummaryWriter

    place = os.environ.get("TENSORBOARD_LOGGING_DIR") or folder
    callback.tb_writer = SummaryWriter(os.path.expanduser(place), purge_step=step + 1 if step else None)
