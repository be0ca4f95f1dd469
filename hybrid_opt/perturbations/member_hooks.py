"""Hooks that make each row of a batch see its own member's weights. Next: `low_rank.py`.

One idea: rows come member-major, so a module's input (members * rows, ...) is viewed as (directions, rows * ..., features), and
what the perturbation adds to the output is a batched product. Weights are only read, so it does not matter where they
are stored or that the rows of other members use them at the same time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hybrid_opt.engines.contract import whole_shape
from hybrid_opt.errors import UserError
from hybrid_opt.perturbations.factors import Factors, activated
from hybrid_opt.perturbations.kept_memory import KeptMemory
from hybrid_opt.perturbations.refusal import refusal
from hybrid_opt.perturbations.swapping import every_module_called, owners_of


class MemberHooks:
    """Makes a model's forward passes serve several members.

    Args:
        model: a model of nn.Linear, transformers' Conv1D, nn.Embedding, LayerNorm and RMSNorm modules.
        parameters: those that get noise, by name; a tied one may have several owners.
        same_input: names of weights of linear layers that get the very same tensor; see `Rehearsal.same_input`.

    Raises:
        UserError: one of the parameters belongs to another kind of module.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], same_input: Iterable[Sequence[str]] = ()
    ) -> None:
        if reasons := why_not(model, parameters):
            raise UserError(refusal(*next(iter(reasons.items()))))
        self.parameters = parameters
        owners = owners_of(model, parameters)
        linear = {name for module, names in owners.items() if type(module) is nn.Linear for name in names.values()}
        self.same_input = [names for names in same_input if linear.issuperset(names)]
        self._attach = [(_family(module), module, names) for module, names in owners.items()]

    @contextmanager
    def attached(self, factors: Factors) -> Iterator[None]:
        """Inside, forward passes take a batch repeated for all members, member-major, each with its own weights.

        Generation with a key-value cache is a sequence of such passes and works too.

        Raises:
            UserError: a module gets rows that cannot be told apart by member.
        """
        with ExitStack() as stack:
            stack.enter_context(every_module_called())
            stack.enter_context(activated(factors))
            for attach, module, names in self._attach:
                stack.enter_context(attach(module, names, factors))
            yield


def why_not(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """The parameters whose low rank noise cannot be evaluated, each with the reason."""
    reasons = {}
    for module, names in owners_of(model, parameters).items():
        for name in names.values():
            if _family(module) is None:
                reasons[name] = f"it belongs to a {type(module).__name__} module"
            elif "forward" in vars(module):
                reasons[name] = f"the forward of its {type(module).__name__} module has been replaced"
            elif (dimensions := len(whole_shape(parameters[name]))) > 2:
                reasons[name] = f"it has {dimensions} dimensions"
    return reasons


# ---------------------------------------------------------------- kinds of modules

Attach = Callable[[nn.Module, dict[str, str], Factors], Any]


def _family(module: nn.Module) -> Attach | None:
    """How to attach noise to a module, or None if there is no way. A forward of one's own may do anything: no way."""
    forward = type(module).forward
    if forward is nn.Linear.forward or type(module).__name__ == "Conv1D":
        return _linear
    if forward is nn.Embedding.forward:
        return _on_output(_embedding)
    if isinstance(module, nn.Embedding):
        return _on_lookup
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return _on_output(_torch_norm)
    if "RMSNorm" in type(module).__name__ and [len(whole_shape(p)) for p in module.parameters()] == [1]:
        return _swapped_weight
    return None


def _on_output(correct: Callable[[nn.Module, Tensor, Tensor, dict[str, str], Factors], Tensor]) -> Attach:
    """Attach by a hook that corrects the module's output."""

    @contextmanager
    def attach(module: nn.Module, names: dict[str, str], factors: Factors) -> Iterator[None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
            return correct(module, _first(args, kwargs), output, names, factors)

        # First of the hooks: ZeRO-3's own, which comes later then, takes the weights away.
        handle = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    return attach


def _first(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """A module's input, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def _refuse_other_rows(module: nn.Module, x: Tensor, names: dict[str, str], factors: Factors) -> None:
    """Rows that are not the batch's (positions shared by all, tokens sorted to experts) have no member of their own.

    If there is only one member, all rows are its own.
    """
    if factors.scale.numel() > 1 and len(x) % factors.rows:
        reason = (
            f"its {type(module).__name__} module is called with {len(x)} rows for {factors.rows} examples, so the rows of "
            "different members cannot be told apart"
        )
        raise UserError(refusal(next(iter(names.values())), reason))


@contextmanager
def _linear(module: nn.Module, names: dict[str, str], factors: Factors) -> Iterator[None]:
    """For nn.Linear and Conv1D: `y = x W^T + scale (x A^T) B + bias + bias noise`.

    The noise's part is written first and the large product added to it, which takes no longer than the product alone. Autocast knows
    nothing of products that are added in place, so what it would do is done here.
    """
    is_conv1d = type(module).__name__ == "Conv1D"  # its weight is (in, out), the transpose of a Linear's

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x = _first(args, kwargs)
        _refuse_other_rows(module, x, names, factors)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        flat, weight = factors.by_direction(x).to(dtype), module.weight.to(dtype)
        y = _bias(module, flat, names, factors)
        if "weight" in names:
            a, b = factors.matrices[names["weight"]]
            if is_conv1d:
                a, b = b, a
            y = _plus_outer(y, factors.project(names["weight"], a, x), b.to(dtype), factors, factors.memory)
        y = y.flatten(0, 1).addmm_(flat.flatten(0, 1), weight if is_conv1d else weight.T)
        return y.view(*x.shape[:-1], y.shape[-1])

    with _forward_replaced(module, forward):
        yield


def _bias(module: nn.Module, x: Tensor, names: dict[str, str], factors: Factors) -> Tensor | None:
    """The bias of each row, (directions, rows, out), or (out,) if it has no noise, or None."""
    bias = None if module.bias is None else module.bias.to(x.dtype)
    if "bias" not in names:
        return bias
    noise = factors.vectors[names["bias"]].to(x.dtype).unsqueeze(1)
    return torch.addcmul(bias, factors.scale_of_each_row(x.shape[1], x.dtype).unsqueeze(-1), noise)


def _embedding(module: nn.Module, ids: Tensor, y: Tensor, names: dict[str, str], factors: Factors) -> Tensor:
    """`y + scale B[:, ids]^T A`; ids (members * rows, ...), y (members * rows, ..., features)."""
    # One row for everybody, such as positions: members part here.
    if factors.scale.numel() > 1 and ids.dim() == 2 and len(ids) == 1 < factors.rows:
        ids, y = ids.expand(factors.rows, -1), y.expand(factors.rows, -1, -1)
    _refuse_other_rows(module, ids, names, factors)
    a, b = factors.matrices[names["weight"]]
    rows = ids.reshape(len(a), 1, -1).expand(-1, b.shape[1], -1)
    flat = factors.by_direction(y)
    with torch.autocast(y.device.type, enabled=False):  # which leaves embeddings alone, but not their noise
        return _plus_outer(flat, b.gather(2, rows), a, factors).view(y.shape)


def _plus_outer(
    y: Tensor | None, left: Tensor, right: Tensor, factors: Factors, memory: KeptMemory | None = None
) -> Tensor:
    """`y + scale left^T right`: a new tensor (directions, rows, out), for left (directions, r, rows), right (directions, r, out).

    Args:
        memory: where a large result may go.
    """
    left = left * factors.scale_of_each_row(left.shape[2], left.dtype).unsqueeze(1)
    if left.device.type != "cpu" or left.shape[1] > 4:
        return torch.bmm(left.mT, right) if y is None else torch.baddbmm(y, left.mT, right)
    # On a CPU a multiply-add for each rank is some six times as fast as a thin product.
    out = memory and memory.take((len(left), left.shape[2], right.shape[2]), left.dtype, left.device)
    for k in range(left.shape[1]):
        column, row = left[:, k, :, None], right[:, k : k + 1]
        y = torch.mul(column, row, out=out) if y is None else torch.addcmul(y, column, row, out=y if k else out)
    return y


@contextmanager
def _on_lookup(module: nn.Module, names: dict[str, str], factors: Factors) -> Iterator[None]:
    """For embeddings that do more than look up rows (scale them, count positions): correct the lookup inside."""
    forward = module.forward

    class Lookup(TorchFunctionMode):
        def __torch_function__(
            self,
            function: Callable[..., Any],
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is F.embedding and args[1] is module.weight:
                return _embedding(module, args[0], result, names, factors)
            return result

    def corrected(*args: Any, **kwargs: Any) -> Tensor:
        with Lookup():
            return forward(*args, **kwargs)

    with _forward_replaced(module, corrected):
        yield


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Inside, calls of the module end up here; hooks of others around it still run."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _torch_norm(module: nn.Module, x: Tensor, y: Tensor, names: dict[str, str], factors: Factors) -> Tensor:
    """`normalised(x) * (weight + noise) + bias + noise`, for nn.LayerNorm and nn.RMSNorm."""
    _refuse_other_rows(module, x, names, factors)
    if isinstance(module, nn.LayerNorm):
        normalised = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    else:
        normalised = F.rms_norm(x, module.normalized_shape, eps=module.eps)
    result = normalised * _of_each_row("weight", module, x, names, factors)
    if getattr(module, "bias", None) is not None:
        result = result + _of_each_row("bias", module, x, names, factors)
    return result.to(y.dtype)


def _of_each_row(attribute: str, module: nn.Module, x: Tensor, names: dict[str, str], factors: Factors) -> Tensor:
    """A vector parameter with each row's noise, to multiply with x: (members * rows, 1, ..., features) float32.

    Weights of norms are near 1, where bfloat16 is too coarse (0.008) for a sigma of 1e-3 to be seen.
    """
    parameter = getattr(module, attribute)
    if attribute not in names:
        return parameter
    noise = factors.vectors[names[attribute]].flatten(1).unsqueeze(1) * factors.scale.unsqueeze(-1)
    of_each = noise.flatten(0, 1).view(-1, *parameter.shape) + parameter.float()
    if len(of_each) == 1:
        return of_each[0]
    rows = of_each.repeat_interleave(len(x) // len(of_each), dim=0)
    return rows.view(len(x), *[1] * (x.dim() - 1 - parameter.dim()), *parameter.shape)


@contextmanager
def _swapped_weight(module: nn.Module, names: dict[str, str], factors: Factors) -> Iterator[None]:
    """For the RMSNorm classes of transformers, whose formulas differ: let them compute with each row's own weight."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _first(args, kwargs)
        _refuse_other_rows(module, x, names, factors)
        module._parameters["weight"] = _of_each_row("weight", module, x, names, factors)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        module._parameters["weight"] = weight
        return output.to(weight.dtype)

    weight = module._parameters["weight"]
    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, prepend=True),
    ]
    try:
        yield
    finally:
        module._parameters["weight"] = weight
        for handle in handles:
            handle.remove()
