"""The engine for many processes: weights under DeepSpeed ZeRO; imports deepspeed, as only `zero_checkpoint.py` does too. Next: `idle_state.py`.

One idea: DeepSpeed keeps what backprop may own, in its way, and every update ends in both of the places where a weight lives:
the float32 master, which the next optimizer step starts from, and the copy that forward passes use.
"""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_opt.config.engines import ZeroEngine as ZeroEngineConfig
from hybrid_opt.config.estimators import Backprop
from hybrid_opt.engines.contract import Contribution, Shard, is_spread, whole_shape
from hybrid_opt.engines.deepspeed_config import DeepSpeedSettings
from hybrid_opt.engines.direct import moved_directly, update_directly
from hybrid_opt.engines.idle_state import IdleState
from hybrid_opt.engines.inspection import checksum, first_nonfinite
from hybrid_opt.engines.master_weights import MasterWeights
from hybrid_opt.engines.phase_groups import groups_of, let_groups_rest
from hybrid_opt.engines.rank_loss import watch
from hybrid_opt.engines.ranks import TIMEOUT, Ranks, free_port
from hybrid_opt.engines.torch_optimizer import after_rest, build_optimizer, first_moment_key
from hybrid_opt.engines.update_rules import Treatment
from hybrid_opt.engines.zero_stages import Stage3, Stage12
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.contract import WeightedSum
from hybrid_opt.estimators.modes import requiring_grad

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns of it

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.utils import safe_get_full_grad, safe_get_full_optimizer_state

from hybrid_opt.engines import zero_checkpoint

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
GRADIENT_BUFFERS = (OffloadStateTypeEnum.lp_grads, OffloadStateTypeEnum.contiguous_grad_buffer)


def join_ranks() -> Ranks:
    """Meet the processes that the launcher started; without a launcher there is only this one."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        os.environ |= alone
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = free_port()
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with contextlib.redirect_stdout(io.StringIO()):  # each rank would say how it got its communication compiled
        deepspeed.init_distributed(timeout=TIMEOUT, verbose=False)
    device = torch.device(get_accelerator().current_device_name())
    return Ranks(deepspeed.comm.get_rank(), deepspeed.comm.get_world_size(), device)


@dataclass(frozen=True)
class ReducedGradients:
    """The gradients of a backward pass where DeepSpeed left them, averaged over ranks; there until the optimizer's step."""

    engine: "ZeroEngine"

    def read(self, shard: Shard) -> Tensor:
        """This rank's slice of the parameter's gradient, float32."""
        gradient = self.engine.stage.gradient(self.engine.parameters[shard.name])
        return gradient.to(shard.data.device).float() / self.engine.loss_scale

    def add_to(self, out: Tensor, shard: Shard, factor: float) -> None:
        """See `Estimate.add_to`."""
        out.add_(self.read(shard), alpha=factor)

    def whole(self, name: str) -> Tensor:
        """See `Gradient.whole`."""
        gradient = safe_get_full_grad(self.engine.parameters[name])
        return gradient.flatten().float() / self.engine.loss_scale


class ZeroEngine:
    """Holds a model under DeepSpeed ZeRO 1, 2 or 3.

    Parameters that backprop never owns stay out of DeepSpeed's optimizer: they have no optimizer state and no gradient, and
    `requires_grad` False. At stages 1 and 2 they are whole on every rank, and all ranks make the same update; at stage 3 each
    rank updates its part.

    Args:
        model: any module, the same on all ranks (rank 0's weights are taken).
        backprop: the backprop estimator's configuration, or None if there is none.
        owned: parameters that backprop owns, for each phase; and sets that it may own apart from the others.
        movable: parameters that anybody may ever move.
        config: the `engine` section.
        seed: decides the rounding; compared between ranks.

    Raises:
        UserError: settings that contradict each other, or that DeepSpeed cannot do.
    """

    memory_limit: int | None = None

    def __init__(
        self,
        model: nn.Module,
        backprop: Backprop | None,
        owned: Sequence[Collection[str]],
        movable: Collection[str],
        *,
        config: ZeroEngineConfig,
        seed: int = 0,
    ) -> None:
        self.ranks = join_ranks()
        self.config, self.model, self.device, self.seed = config, model, self.ranks.device, seed
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.movable = [name for name in self.parameters if name in movable]
        self.owned = set().union(*owned)
        self.groups = groups_of(owned, list(self.parameters))
        self.independent_forwards = config.zero_stage < 3 or self.ranks.world_size == 1
        for name, p in self.parameters.items():
            p.requires_grad_(name in self.owned)
        settings = DeepSpeedSettings(config)
        self.deepspeed = self._initialize(backprop, settings)
        optimizer = self.deepspeed.optimizer if self.deepspeed else None
        self.stage = Stage3(optimizer, self.ranks.rank) if config.zero_stage == 3 else Stage12(optimizer)
        self.idle = self._idle_state(settings) if self.owned else None
        self.master_weights = MasterWeights(config.master_weights, seed)
        direct = {name: self.stage.weights(self.parameters[name])[0] for name in self.movable if name not in self.owned}
        self.master_weights.check(direct)
        self.masters = {name: data.float() for name, data in direct.items() if self.master_weights.needed(data)}
        self.has_gradients = False
        self.watch = watch(self.ranks) if self.ranks.world_size > 1 else None

    @property
    def loss_scale(self) -> float:
        """Factor that float16 losses are multiplied by, and so their gradients."""
        return float(self.deepspeed.optimizer.loss_scale)

    def shards(self, names: Collection[str]) -> Iterator[Shard]:
        """See `Engine.shards`; only those of which a part is on this rank."""
        for name in self.movable:
            if name in names:
                p = self.parameters[name]
                data, start = (self.stage.master(p) or (None, 0)) if name in self.owned else self.stage.weights(p)
                if data is not None and len(data):
                    whole_everywhere = self.config.zero_stage < 3 and name not in self.owned
                    copies = self.ranks.world_size if whole_everywhere else 1
                    yield Shard(name, self.masters.get(name, data), start, whole_shape(p), copies)

    def gradients(
        self, losses: Sequence[Callable[[], Tensor]], names: Collection[str]
    ) -> tuple[ReducedGradients, float]:
        """See `Engine.gradients`."""
        if unknown := set(names) - self.owned:
            raise UserError(
                f"policy: backprop gets parameter {min(unknown)}, which no phase's policy gave it when the engine was made, so "
                "DeepSpeed's optimizer does not know it; name it in the policy of the phase that trains it"
            )
        self.idle.bring_back()
        self.has_gradients = True
        total, owned = 0.0, {name: p for name, p in self.parameters.items() if name in self.owned}
        with requiring_grad(owned, names):
            for number, loss_of in enumerate(losses, start=1):
                self.deepspeed.set_gradient_accumulation_boundary(number == len(losses))
                self.deepspeed.optimizer.clear_backward_seen_flag()  # as DeepSpeed's own forward would
                loss = loss_of()
                # DeepSpeed takes the mean over ranks; the losses are parts of a sum.
                self.deepspeed.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
                total += loss.item()
        return ReducedGradients(self), self.ranks.total(total)

    def first_moment(self, name: str) -> Tensor | None:
        """See `Engine.first_moment`."""
        if name not in self.owned:
            return None
        self.idle.bring_back()
        p = self.parameters[name]
        key = first_moment_key(self.stage.optimizer_state(p))
        return None if key is None else safe_get_full_optimizer_state(p, key).flatten().float()

    @torch.no_grad()
    def apply(self, contributions: Sequence[Contribution], step: int) -> None:
        """See `Engine.apply`."""
        owned, others = moved_directly(contributions)
        if owned:
            self._step_optimizer(contributions, owned)
        if others:
            update_directly(self.shards(others), contributions, self.master_weights, step)
            self._refresh(masters=not others.isdisjoint(self.owned))
        if self.idle:
            self.idle.count(bool(owned))
        if self.config.check_every and (step + 1) % self.config.check_every == 0:
            self.compare_ranks(step)

    def after_rest(self, treatment: Treatment, steps: int) -> None:
        """See `Engine.after_rest`: all of it on this rank, which is here, because a gradient is."""
        after_rest(self.deepspeed.optimizer.optimizer, treatment, steps)
        self.stage.relink_state()

    def compare_ranks(self, step: int) -> None:
        """Whether all ranks see the same weights, seed and step.

        Raises:
            UserError: naming the first parameter that differs.
        """
        if self.ranks.world_size == 1:
            return
        named = dict(self.model.named_parameters())
        whole_here = [p.data if p.shape == whole_shape(p) else torch.zeros(0) for p in named.values()]
        own = torch.tensor([self.seed, step, *(checksum(values).item() for values in whole_here)])
        everybody = self.ranks.gather(own)
        if (differs := (everybody != everybody[0]).nonzero()).numel():
            rank, place = differs[differs[:, 1].argmin()].tolist()
            what = ["the seed", "the step", *(f"parameter {name}" for name in named)][place]
            raise UserError(
                f"step {step}: {what} of rank {rank} is not that of rank 0, so the ranks no longer train one model; go on from the "
                "last checkpoint with --resume, and look for a machine with other software or failing memory"
            )

    def is_finite(self) -> bool:
        """See `Engine.is_finite`."""
        lost = first_nonfinite((shard.name, shard.data) for shard in self.shards(self.movable))
        return not self.ranks.any(lost is not None)

    def forward_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.forward_weights`; at stage 3 this rank's part."""
        for name, p in self.model.named_parameters():
            yield name, self.stage.weights(p)[0] if is_spread(p) else p.data

    @torch.no_grad()
    def whole_weights(self) -> dict[str, Tensor] | None:
        """See `Engine.whole_weights`; in main memory, gathered one parameter at a time."""
        result, seen = {}, {}
        for key, value in self.model.state_dict(keep_vars=True).items():
            if id(value) not in seen:  # a tied one comes under several names
                with deepspeed.zero.GatheredParameters([value], enabled=is_spread(value)):
                    seen[id(value)] = value.detach().cpu().clone() if self.ranks.rank == 0 else None
            result[key] = seen[id(value)]
        return result if self.ranks.rank == 0 else None

    def layout(self) -> dict[str, int]:
        """See `Engine.layout`."""
        return {"ranks": self.ranks.world_size, "zero_stage": self.config.zero_stage}

    def state_dict(self, folder: Path | None = None) -> dict[str, Any]:
        """DeepSpeed's own checkpoint, unless somebody else lets DeepSpeed write and read it (no folder), and the weights that its optimizer
        does not have: at stages 1 and 2 rank 0's serve all."""
        if self.owned and folder is not None:
            self.idle.bring_back()
            zero_checkpoint.save(self.deepspeed, folder)
        mine = self.config.zero_stage == 3 or self.ranks.rank == 0
        direct = set(self.movable) - self.owned if mine else ()
        saved = self.model.state_dict()
        return {
            "weights": {shard.name: shard.data for shard in self.shards(direct)},
            "buffers": {name: b for name, b in self.model.named_buffers() if name in saved} if mine else {},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], folder: Path | None = None) -> None:
        """See `Engine.load_state_dict`; without a folder DeepSpeed has read its own checkpoint already."""
        if self.owned:
            if folder is not None:
                self.idle.bring_back()
                if self.has_gradients:  # of a step that was not taken: they would be added to the next one's
                    self.deepspeed.step()
                    self.has_gradients = False
                zero_checkpoint.load(self.deepspeed, folder)
            self.stage.relink_state()
        buffers = dict(self.model.named_buffers())
        for name, buffer in state["buffers"].items():
            buffers[name].copy_(buffer)
        for shard in self.shards(set(self.movable) - self.owned):
            shard.data.copy_(state["weights"][shard.name])
        self._refresh(masters=bool(self.owned))

    def leave(self) -> None:
        """See `Engine.leave`."""
        self.ranks.wait()
        if self.watch:
            self.watch.stop()

    def _initialize(self, backprop: Backprop | None, settings: DeepSpeedSettings) -> Any:
        """DeepSpeed's engine; None where there is nothing that it could spread."""
        dtype = settings.dtype(str(next(self.model.parameters()).dtype).removeprefix("torch."), given=False)
        if getattr(torch, dtype) not in get_accelerator().supported_dtypes():
            raise UserError(
                f"engine: DeepSpeed does not compute in {dtype} on this device ({self.device}); write bf16: true"
            )
        for p in self.model.parameters():
            p.data = p.data.to(getattr(torch, dtype)) if p.is_floating_point() else p.data
        if not self.owned and self.config.zero_stage < 3:
            self.model.to(self.device)
            self.ranks.same_for_all([tensor.data for tensor in (*self.model.parameters(), *self.model.buffers())])
            return None
        optimizer = None
        if self.owned:
            if backprop.optimizer == "Adafactor":
                raise UserError(
                    "optimizer: Adafactor looks at the shape of matrices, which ZeRO flattens; write AdamW, or engine: {type: local}"
                )
            groups = [{"params": [self.parameters[name] for name in group]} for group in self.groups]
            optimizer = build_optimizer(backprop, groups)
            let_groups_rest(optimizer)
        config = settings.deepspeed(
            backprop or Backprop(type="backprop", learning_rate=1.0),
            dtype,
            self.ranks.world_size,
            getattr(getattr(self.model, "config", None), "hidden_size", None),
        )
        engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=config, dist_init_required=False
        )
        zero_checkpoint.read_as_data(engine)
        return engine

    def _idle_state(self, settings: DeepSpeedSettings) -> IdleState:
        pinned = {"device": OffloadDeviceEnum.cpu, "pin_memory": self.device.type == "cuda"}
        away = partial(self.deepspeed.offload_states, include=GRADIENT_BUFFERS, **pinned)
        return IdleState(
            self.deepspeed.optimizer,
            self.stage,
            self.device,
            self.config.offload_idle_after,
            stays=settings.offloads("offload_optimizer"),
            buffers=None if settings.offloads() else (away, self.deepspeed.reload_states),
        )

    def _step_optimizer(self, contributions: Sequence[Contribution], owned: set[str]) -> None:
        (plain,) = (c for c in contributions if c.rule is None)
        scale = self.loss_scale
        for shard in self.shards(self.owned):
            p = self.parameters[shard.name]
            terms = [(c.weight, c.estimate) for c in contributions if shard.name in c.names]
            if shard.name not in owned:  # another phase's: what its buffer holds must not count in the norm
                self.stage.set_gradient(p, torch.zeros_like(shard.data))
            elif terms != [(1.0, plain.estimate)]:
                self.stage.set_gradient(p, WeightedSum(terms).read(shard).mul_(scale))
        for group, names in zip(self.deepspeed.optimizer.param_groups, self.groups, strict=True):
            group["lr"], group["rests"] = plain.learning_rate, owned.isdisjoint(names)
        self.deepspeed.step()
        self.has_gradients = False

    def _refresh(self, masters: bool) -> None:
        """Let forward passes see what was written, `masters` being those of DeepSpeed's optimizer."""
        for name, master in self.masters.items():
            self.stage.weights(self.parameters[name])[0].copy_(master)
        self.stage.refresh(masters)
