"""transformers' Trainer, with a schedule of estimators in place of its optimizer. Next: `training_arguments.py`, `label_losses.py`,
`../training/hybrid_optimizer.py`.

One idea: Trainer keeps all that it does around a step (data, callbacks, logging, evaluation, checkpoints, uploads), and the step itself is
`HybridOptimizer.step`. It is taken when the last part of the step's batch arrives; the optimizer that Trainer sees has nothing left to do.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hybrid_opt.config.loading import load_schedule
from hybrid_opt.config.schedule import ScheduleFile
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.modes import training_mode
from hybrid_opt.integrations.label_losses import LabelLosses
from hybrid_opt.integrations.step_batches import everybodys, joined
from hybrid_opt.integrations.training_arguments import engine_of, with_arguments
from hybrid_opt.machine.memory import forget_peak, peak_memory_bytes
from hybrid_opt.objectives.contract import Objective, as_objective, count_examples
from hybrid_opt.recovery.state_files import read_state, write_state
from hybrid_opt.run_files.durable import written_aside
from hybrid_opt.training.deciding import Decisions
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from hybrid_opt.training.step_report import StepReport

logger = logging.get_logger(__name__)
NEEDED = ("_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler", "_get_grad_norm")
"""Trainer's own methods that are taken over, though they are not public: if one went, state would be lost without a word."""
STATE = "hybrid_opt"
"""Folder in a checkpoint, with one for each rank."""


class HybridTraining:
    """Goes before a Trainer among a class's bases: `class HybridSFTTrainer(HybridTraining, trl.SFTTrainer): ...`.

    Takes that Trainer's arguments, and:

    Args:
        schedule: a path, a shipped recipe's name, a dictionary, or a `ScheduleFile`. What `TrainingArguments` say of the optimizer (learning
            rate, its schedule, warm-up, clipping, optimizer, weight decay) takes the place of what it says of backprop, if they have
            another value than their default; ES has what the schedule says.
        objective: `losses(model, batch) -> Tensor (examples,)`, or an Objective, whose mean is minimised. None: the loss of the model's own
            labels by example (`LabelLosses`), where that is known and the Trainer computes no other; else the Trainer's `compute_loss`,
            one ES member a forward pass, and the whole step's batch at once.
        probe_dataset: rows on which the loss is measured to find out who lowers it; `adaptive` schedules need them.
        memory_budget: bytes, or such as `20GB`, that the run is fitted into, see `HybridOptimizer`.

    A step's batch is `per_device_train_batch_size * gradient_accumulation_steps` examples of all ranks together: backprop takes it in parts of
    `per_device_train_batch_size`, all members of ES see all of it. The noise follows from `args.seed`.

    Raises:
        UserError: arguments that cannot be followed, or several processes without `deepspeed=`; when training begins, all that
            `HybridOptimizer` raises.
    """

    hybrid: HybridOptimizer | None = None
    """What takes the steps; there from the beginning of `train()` on."""
    report: StepReport | None = None
    """What the latest step told of itself."""

    def __init__(
        self,
        *args: Any,
        schedule: str | Path | dict[str, Any] | ScheduleFile,
        objective: Objective | Callable[[nn.Module, Any], Tensor] | None = None,
        probe_dataset: Any = None,
        memory_budget: int | str | None = None,
        **options: Any,
    ) -> None:
        if missing := [name for name in NEEDED if not hasattr(Trainer, name)]:
            raise UserError(
                f"transformers: this version's Trainer has no {missing[0]}, so the state of a schedule could not be saved; install one that "
                "hybrid_opt was tested with (see constraints.txt), or use hybrid_opt.Trainer"
            )
        self.schedule = load_schedule(schedule)
        super().__init__(*args, **options)
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise UserError("optimizers: the schedule says how each estimator steps; leave them out")
        self.engine_config = engine_of(self.args)
        with_arguments(self.schedule, self.args)  # what cannot be followed is said before anything is loaded
        self.objective = as_objective(objective) or self._label_losses()
        self.probe_dataset, self.memory_budget = probe_dataset, memory_budget
        self._parts: list[Mapping[str, Any]] = []

    def train(self, *args: Any, **options: Any) -> Any:
        """See `transformers.Trainer.train`; estimators begin anew, or where the checkpoint left them."""
        self.optimizer, self._parts = None, []
        return super().train(*args, **options)

    # ------------------------------------------------------------ what Trainer asks for

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The estimators and their engine, and for Trainer something to hold in their place."""
        if self.optimizer is None:
            steps = self.state.max_steps or None
            self.hybrid = HybridOptimizer(
                self.model,
                self.objective,
                schedule=with_arguments(self.schedule, self.args, steps),
                steps=steps,
                seed=self.args.seed,
                engine=self.engine_config,
                memory_budget=self.memory_budget,
            )
            self.decisions = Decisions(
                self.hybrid, None if self.probe_dataset is None else self._probe_loss, None, logger.warning
            )
            self.optimizer = StepsElsewhere(self.hybrid)
            if self.engine_config:
                self._adopt_deepspeed()
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rates are the estimators' own; Trainer sees the present one."""
        if self.lr_scheduler is None:
            self.lr_scheduler = PresentRate(self.optimizer if optimizer is None else optimizer)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Keep a part of the step's batch; with the last one, take the step.

        Returns:
            The loss of the step with its last part, 0 with the others, which Trainer adds up; NaN if nothing was evaluated.
        """
        model.train()
        self._parts.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        parts, self._parts = self._parts, []
        batch = joined(everybodys(parts, self.args.world_size), self._pad_token())
        self.report = self._step(batch, num_items_in_batch)
        rates = self.report.learning_rates
        acting = self.schedule.backprop_name if self.schedule.backprop_name in rates else next(iter(rates))
        self.optimizer.param_groups[0]["lr"] = rates[acting]
        loss = float("nan") if self.report.loss is None else self.report.loss
        return torch.tensor(loss, device=self.args.device)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """See `transformers.Trainer.evaluate`; the schedule's triggers learn the loss (of several sets the mean) as
        `validation_loss`."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        losses = [value for key, value in metrics.items() if key.startswith("eval_") and key.endswith("loss")]
        if self.is_in_train and metric_key_prefix == "eval" and losses:
            self.hybrid.tell({"validation_loss": sum(losses) / len(losses)})
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `transformers.Trainer.log`; with a step's loss go the estimators' losses and learning rates, and what all steps have taken."""
        super().log({**logs, **self._told()} if "loss" in logs else logs, start_time)

    # ------------------------------------------------------------ checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        place = Path(output_dir, STATE)
        place.mkdir(parents=True, exist_ok=True)
        # An anchor's first weights too: Trainer puts a checkpoint's weights into the model before anchors look at it.
        state = {"hybrid": self.hybrid.state_dict(), "start": self.hybrid.updates.anchor.start}
        with written_aside(place / f"rank{self.args.process_index}") as aside:
            write_state(aside, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state: dict[str, Any] = {}
        for rank in sorted({0, self.args.process_index}):  # rank 0 has what all have in common
            place = Path(checkpoint, STATE, f"rank{rank}")
            if not place.is_dir():
                raise UserError(
                    f"resume_from_checkpoint: {place} is missing: the checkpoint was not saved by a HybridTrainer of as many ranks, or with "
                    "save_only_model=True; load its model instead, and start anew from its weights"
                )
            read_state(place, state)
        self.hybrid.load_state_dict(state["hybrid"])
        self.hybrid.updates.anchor.start = state["start"]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Gradients are gone when Trainer looks for them."""

    # ------------------------------------------------------------ pieces

    def _step(self, batch: dict[str, Any], items: Any) -> StepReport:
        hybrid, device = self.hybrid, self.hybrid.engine.device
        self.decisions.plan()
        acting = hybrid.acting()
        self.decisions.attribution.before_step(tuple(acting))
        forget_peak(device)
        report = hybrid.step(batch) if self.objective else self._step_by_computed_loss(batch, items)
        self.decisions.stepped(report, peak_memory_bytes(device), acting)
        for reason in report.decisions:
            logger.info("step %d: %s", report.step, reason)
        return report

    def _step_by_computed_loss(self, batch: dict[str, Any], items: Any) -> StepReport:
        batch = self._prepare_inputs(batch)
        try:
            return self.hybrid.step(lambda: self._computed_loss(batch, items))
        except UserError as error:
            raise type(error)(
                f"{error} (compute_loss is asked for the loss of the whole batch; better pass objective=, losses by example, such as LabelLosses(model))"
            ) from error

    def _computed_loss(self, batch: dict[str, Any], items: Any = None) -> Tensor:
        """The loss of a batch.

        Args:
            items: labels that it has, as Trainer counts them over all ranks; it then multiplies the loss by their number.
        """
        ranks = self.args.world_size
        items = items if ranks == 1 or self.args.average_tokens_across_devices else None
        scaled = ranks > 1 and items is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func)
        with self.compute_loss_context_manager():
            own = dict(batch)  # of which it may take keys out
            loss = self.compute_loss(self.model, own, num_items_in_batch=items)
        if not isinstance(loss, Tensor) or not loss.is_floating_point() or loss.dim():
            raise UserError(f"compute_loss: it must return the mean loss as a tensor of no dimensions, not {loss!r}")
        return loss / ranks if scaled else loss

    def _label_losses(self) -> LabelLosses | None:
        """If they are what this Trainer minimises."""
        own = type(self).compute_loss is Trainer.compute_loss and self.compute_loss_func is None
        return (
            LabelLosses(self.model) if own and self.label_smoother is None and LabelLosses.knows(self.model) else None
        )

    @torch.no_grad()
    def _probe_loss(self) -> float:
        """Not by Trainer's evaluation, whose data loaders and metrics are its own."""
        total, examples, ranks = 0.0, 0, self.hybrid.engine.ranks
        with training_mode(self.model, False):
            for part in self.get_test_dataloader(self.probe_dataset):
                batch = self._prepare_inputs(part)
                count = count_examples(batch) or 1
                mean = self.objective.losses(self.model, batch).mean() if self.objective else self._computed_loss(batch)
                total, examples = total + count * mean.item(), examples + count
        return ranks.total(total) / ranks.total(examples)

    def _pad_token(self) -> int:
        """What rows of tokens are filled up with; a model may look for it, as those that classify sequences do."""
        places = (self.processing_class, getattr(self.model, "config", None))
        known = (getattr(place, "pad_token_id", None) for place in places)
        return next((token for token in known if token is not None), 0)

    def _told(self) -> dict[str, float]:
        if self.report is None:
            return {}
        signals = self.hybrid.signals
        told = {f"{name}/learning_rate": rate for name, rate in self.report.learning_rates.items()}
        told |= {f"{name}/loss": cost.loss for name, cost in self.report.costs.items() if cost.loss is not None}
        totals = ("forwards", "backwards", "forward_equivalents")
        return told | {f"total_{name}": getattr(signals, name) for name in totals}

    def _adopt_deepspeed(self) -> None:
        """Let Trainer and accelerate use the engine that DeepSpeed has made here, as if they had made it."""
        engine = self.hybrid.engine.deepspeed
        if engine is None:
            raise UserError(
                "TrainingArguments: deepspeed: without backprop there is nothing that ZeRO's stages 1 and 2 could spread, and Trainer's checkpoints "
                "need an engine of DeepSpeed's; write stage 3, or start the run by hybrid-opt train"
            )
        self.model_wrapped = self.deepspeed = engine
        self.accelerator.deepspeed_config = engine.config
        self.accelerator._models.append(engine)


class HybridTrainer(HybridTraining, Trainer):
    """`transformers.Trainer` that takes a schedule; see `HybridTraining` for what it adds.

    trainer = HybridTrainer(model, TrainingArguments("out", max_steps=100), train_dataset=rows, schedule="alternate")
    trainer.train()
    """


class StepsElsewhere(torch.optim.Optimizer):
    """What Trainer holds as its optimizer: the parameters and the present learning rate."""

    def __init__(self, hybrid: HybridOptimizer) -> None:
        super().__init__(list(hybrid.engine.parameters.values()), {"lr": 0.0})

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Nothing: the step has been taken."""


class PresentRate(torch.optim.lr_scheduler.LRScheduler):
    """Leaves learning rates as they are."""

    def get_lr(self) -> list[float]:
        """The present ones."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float]:
        """The present ones."""
        return self.get_lr()
