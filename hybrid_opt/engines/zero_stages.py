"""Where DeepSpeed keeps a rank's part of weights, masters and gradients at each ZeRO stage. Next: `zero.py`.

One idea: stages differ only in where things lie, so they are two implementations of one small protocol, and the only place
that knows DeepSpeed's inner structures. They are checked when the engine starts, because some are not documented.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hybrid_opt.engines.contract import whole_shape
from hybrid_opt.errors import UserError

Slice = tuple[Tensor, int]
"""A flat piece of a parameter, and the index of its first value in the flattened parameter."""


class Stage(Protocol):
    """Access to a rank's part of each parameter."""

    def weights(self, p: nn.Parameter) -> Slice:
        """The values that forward passes use, as far as this rank writes them; perhaps none."""
        ...

    def master(self, p: nn.Parameter) -> Slice | None:
        """The float32 master values of a parameter that the optimizer has; None if none of them is on this rank."""
        ...

    def gradient(self, p: nn.Parameter) -> Tensor:
        """The reduced gradient that belongs to `master`, times the loss scale: flat, any dtype."""
        ...

    def set_gradient(self, p: nn.Parameter, values: Tensor) -> None:
        """Overwrite what `gradient` gives; between backward and step."""
        ...

    def optimizer_state(self, p: nn.Parameter) -> Mapping[str, Any]:
        """What the optimizer remembers of the parameters of p's group, by quantity; empty before its first step. The same
        quantities on all ranks."""
        ...

    def relink_state(self) -> None:
        """The tensors of the optimizer's state are others now: let DeepSpeed's `safe_get_full_optimizer_state` find them."""
        ...

    def refresh(self, masters: bool) -> None:
        """Let forward passes see weights that were written, and masters if they were."""
        ...


class Stage12:
    """Weights are whole on every rank; masters and reduced gradients of a flat buffer of all parameters are dealt out."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        if optimizer is not None:
            _require(
                optimizer,
                "update_lp_params",
                "averaged_gradients",
                "single_partition_of_fp32_groups",
                "bit16_groups",
                "_hp_optimizer_states_linked",
                "_lazy_init_hp_params_optimizer_state",
            )
            self._group = {id(p): number for number, group in enumerate(optimizer.bit16_groups) for p in group}

    def weights(self, p: nn.Parameter) -> Slice:
        """All of them: every rank makes the same update."""
        return p.data.view(-1), 0

    def master(self, p: nn.Parameter) -> Slice | None:
        """See `Stage.master`."""
        mapping = p._hp_mapping
        return None if mapping is None else (mapping.hp_fragment.data, mapping.lp_fragment_address.start)

    def gradient(self, p: nn.Parameter) -> Tensor:
        """See `Stage.gradient`."""
        mapping = p._hp_mapping
        values = mapping.get_lp_grad_fragment(p._index_in_param_group).view(-1)
        address = mapping.lp_fragment_address
        # Some ways of accumulating keep the whole parameter's gradient on each rank.
        return values if len(values) == address.numel else values.narrow(0, address.start, address.numel)

    def set_gradient(self, p: nn.Parameter, values: Tensor) -> None:
        """See `Stage.set_gradient`. With offloading DeepSpeed has the norm and the overflow of the old values already."""
        self.gradient(p).copy_(values)
        if self.optimizer.cpu_offload:
            self.optimizer.norm_for_param_grads[self.optimizer.get_param_id(p)] = values.double().norm()
            self.optimizer.update_offload_overflow_tracker(values)

    def optimizer_state(self, p: nn.Parameter) -> Mapping[str, Any]:
        """See `Stage.optimizer_state`. DeepSpeed links all groups at once, also those that have no state yet, and never again."""
        group = self.optimizer.single_partition_of_fp32_groups[self._group[id(p)]]
        state = self.optimizer.optimizer.state.get(group, {})
        if state and p._hp_mapping is not None and not p._hp_mapping.optim_fragment:
            self.relink_state()
        return state

    def relink_state(self) -> None:
        """See `Stage.relink_state`. Each parameter has a view of its part, which would also keep the old tensors in memory."""
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def refresh(self, masters: bool) -> None:
        """See `Stage.refresh`. Weights without a master in the optimizer are written in place, so nothing is left to do."""
        if masters:
            self.optimizer.update_lp_params()


class Stage3:
    """Every parameter is cut into equal parts, the last one padded; forward passes gather them and throw them away."""

    def __init__(self, optimizer: Any, rank: int) -> None:
        self.optimizer, self.rank = optimizer, rank
        self.trains = hasattr(optimizer, "fp16_groups")  # without anything to train DeepSpeed puts something else there
        if self.trains:
            _require(
                optimizer,
                "_reassign_or_swap_out_partitioned_parameters",
                "fp32_partitioned_groups_flat",
                "grad_position",
                "get_local_fp32_grad_for_param",
                "set_local_grad_for_param",
                "parameter_offload",
                "invalidate_secondary_tensor",
            )
        self.offload = optimizer.parameter_offload if self.trains else optimizer
        _require(self.offload, "partition_all_parameters", "persistent_parameters")

    def weights(self, p: nn.Parameter) -> Slice:
        """This rank's part, without padding; small parameters have none on the last ranks."""
        return self._without_padding(p, p.ds_tensor.data.view(-1))

    def master(self, p: nn.Parameter) -> Slice | None:
        """See `Stage.master`."""
        group, offset, count = self.optimizer.grad_position[self.optimizer.get_param_id(p)]
        data, start = self._without_padding(
            p, self.optimizer.fp32_partitioned_groups_flat[group].data.narrow(0, offset, count)
        )
        return (data, start) if len(data) else None

    def gradient(self, p: nn.Parameter) -> Tensor:
        """See `Stage.gradient`."""
        return self._without_padding(p, self.optimizer.get_local_fp32_grad_for_param(p))[0]

    def set_gradient(self, p: nn.Parameter, values: Tensor) -> None:
        """See `Stage.set_gradient`."""
        padded = torch.zeros(p.ds_tensor.numel(), dtype=values.dtype, device=values.device)
        padded[: len(values)] = values
        self.optimizer.set_local_grad_for_param(padded, p)

    def optimizer_state(self, p: nn.Parameter) -> Mapping[str, Any]:
        """See `Stage.optimizer_state`."""
        group, _, _ = self.optimizer.grad_position[self.optimizer.get_param_id(p)]
        return self.optimizer.optimizer.state.get(self.optimizer.fp32_partitioned_groups_flat[group], {})

    def relink_state(self) -> None:
        """See `Stage.relink_state`: the state is looked up each time."""

    def refresh(self, masters: bool) -> None:
        """See `Stage.refresh`. Whole copies that some forward pass left behind go first: they would be used again."""
        self.offload.partition_all_parameters()
        if masters:
            for group in range(len(self.optimizer.fp16_groups)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self.optimizer.invalidate_secondary_tensor()
        if persistent := self.offload.persistent_parameters:  # small ones, which are always whole
            persistent[0].all_gather(persistent)

    def _without_padding(self, p: nn.Parameter, part: Tensor) -> Slice:
        start = self.rank * len(part)
        left = max(0, min(len(part), whole_shape(p).numel() - start))
        return part[:left], start


def _require(thing: Any, *attributes: str) -> None:
    for name in attributes:
        if not hasattr(thing, name):
            raise UserError(
                f"engine: this version of DeepSpeed has no {type(thing).__name__}.{name}, which ES steps need to write "
                "weights; install deepspeed==0.19.8, or write engine: {type: local}"
            )
