"""Hooks that make each row of a batch see its own member's weights. Next: `es.py`.

One idea: rows come member-major, so a module's input (members * rows, ...) is viewed as (members, rows * ..., features), and
what the perturbation adds to the output is a batched product. Weights are only read, so it does not matter where they
are stored or that the rows of other members use them at the same time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hybrid_opt.errors import UserError


@dataclass(frozen=True)
class Factors:
    """Noise of several members, scaled and signed."""

    members: int
    rows: int
    """Examples of all members together; every module's input has a multiple of them as its first dimension."""
    matrices: dict[str, tuple[Tensor, Tensor]]
    """For a matrix (m, n): A (members, n, r) and B (members, m, r) with noise `B A^T`."""
    vectors: dict[str, Tensor]
    """For any other parameter: (members, *shape)."""


@contextmanager
def perturbed_members(model: nn.Module, parameters: Mapping[str, nn.Parameter], factors: Factors) -> Iterator[None]:
    """Inside, the model's forward passes take a batch repeated for all members, member-major, each with its own weights.

    Args:
        model: a model of nn.Linear, transformers' Conv1D, nn.Embedding, LayerNorm and RMSNorm modules.
        parameters: the parameters by name, to find the modules that own them; a tied one may have several.
        factors: noise for some of the parameters.

    Raises:
        UserError: a parameter with noise belongs to another kind of module, or its module was never called inside, so
            that its noise had no part in the result.
    """
    plan = supported_owners(model, {name: parameters[name] for name in (*factors.matrices, *factors.vectors)})
    called: set[nn.Module] = set()
    with ExitStack() as stack:
        for module, names in plan.items():
            attach = _family(module)
            stack.enter_context(attach(module, names, factors, called.add))
        yield
    for module, names in plan.items():
        if module not in called:
            raise UserError(
                f"policy: the forward pass does not call the {type(module).__name__} module of parameter "
                f"{next(iter(names.values()))}, so low rank noise cannot reach it; write perturbation: {{type: dense}}, or a policy rule with "
                "use: frozen for it"
            )


def supported_owners(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[nn.Module, dict[str, str]]:
    """For each module that owns some of the parameters: its attribute -> the parameter's name.

    Raises:
        UserError: one of the parameters cannot be evaluated low rank; naming it and the reason.
    """
    owners = _owners(model, parameters)
    for module, names in owners.items():
        for name in names.values():
            reason = None
            if _family(module) is None:
                reason = f"it belongs to a {type(module).__name__} module"
            elif parameters[name].dim() > 2:
                reason = f"it has {parameters[name].dim()} dimensions"
            if reason:
                raise UserError(
                    f"policy: low rank noise cannot be evaluated for parameter {name} because {reason}; write perturbation: "
                    "{type: dense}, or a policy rule with use: frozen for it"
                )
    return owners


def _owners(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[nn.Module, dict[str, str]]:
    names = {id(p): name for name, p in parameters.items()}
    owners = {}
    for module in model.modules():
        own = {a: names[id(p)] for a, p in module.named_parameters(recurse=False) if id(p) in names}
        if own:
            owners[module] = own
    return owners


# ---------------------------------------------------------------- kinds of modules

Attach = Callable[[nn.Module, dict[str, str], Factors, Callable[[nn.Module], None]], Any]


def _family(module: nn.Module) -> Attach | None:
    """How to attach noise to a module, or None if there is no way. A forward of one's own may do anything: no way."""
    forward = type(module).forward
    if forward is nn.Linear.forward or type(module).__name__ == "Conv1D":
        return _on_output(_linear)
    if forward is nn.Embedding.forward:
        return _on_output(_embedding)
    if isinstance(module, nn.Embedding):
        return _on_lookup
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return _on_output(_torch_norm)
    if "RMSNorm" in type(module).__name__ and [p.dim() for p in module.parameters()] == [1]:
        return _swapped_weight
    return None


def _on_output(correct: Callable[[nn.Module, Tensor, Tensor, dict[str, str], Factors], Tensor]) -> Attach:
    """Attach by a hook that corrects the module's output."""

    @contextmanager
    def attach(module, names, factors, called):
        def hook(module, args, kwargs, output):
            called(module)
            x = _first(args, kwargs)
            _refuse_other_rows(module, x, names, factors)
            return correct(module, x, output, names, factors)

        handle = module.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    return attach


def _first(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """A module's input, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def _refuse_other_rows(module: nn.Module, x: Tensor, names: dict[str, str], factors: Factors) -> None:
    """Rows that are not the batch's (positions shared by all, tokens sorted to experts) have no member of their own."""
    if len(x) % factors.rows:
        raise UserError(
            f"policy: the {type(module).__name__} module of parameter {next(iter(names.values()))} is called with {len(x)} rows "
            f"for {factors.rows} examples, so the rows of different members cannot be told apart; let the objective pass "
            "position_ids for every row, or write perturbation: {type: dense}"
        )


def _linear(module: nn.Module, x: Tensor, y: Tensor, names: dict[str, str], factors: Factors) -> Tensor:
    """`y + (x A) B^T + bias noise`; x (members * rows, ..., in), y (members * rows, ..., out)."""
    m = factors.members
    flat = y.reshape(m, -1, y.shape[-1])
    if "weight" in names:
        a, b = factors.matrices[names["weight"]]
        if type(module).__name__ == "Conv1D":  # its weight is (in, out), the transpose of a Linear's
            a, b = b, a
        flat.baddbmm_(x.reshape(m, -1, x.shape[-1]) @ a.to(x.dtype), b.to(x.dtype).mT)  # y is fresh: nobody else's
    if "bias" in names:
        flat += factors.vectors[names["bias"]].to(y.dtype).unsqueeze(1)
    return flat.view(y.shape)


def _embedding(module: nn.Module, ids: Tensor, y: Tensor, names: dict[str, str], factors: Factors) -> Tensor:
    """`y + B[ids] A^T`; ids (members * rows, ...), y (members * rows, ..., features)."""
    a, b = factors.matrices[names["weight"]]
    rows = ids.reshape(factors.members, -1)
    picked = b.gather(1, rows.unsqueeze(-1).expand(-1, -1, b.shape[-1]))
    return torch.baddbmm(y.reshape(factors.members, -1, y.shape[-1]), picked.to(y.dtype), a.to(y.dtype).mT).view(
        y.shape
    )


@contextmanager
def _on_lookup(module, names, factors, called):
    """For embeddings that do more than look up rows (scale them, count positions): correct the lookup inside."""
    own = module.__dict__.get("forward")
    forward = module.forward

    class Lookup(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is F.embedding and args[1] is module.weight:
                called(module)
                _refuse_other_rows(module, args[0], names, factors)
                return _embedding(module, args[0], result, names, factors)
            return result

    def corrected(*args, **kwargs):
        with Lookup():
            return forward(*args, **kwargs)

    module.forward = corrected
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _torch_norm(module: nn.Module, x: Tensor, y: Tensor, names: dict[str, str], factors: Factors) -> Tensor:
    """`normalised(x) * (weight + noise) + bias + noise`, for nn.LayerNorm and nn.RMSNorm."""
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
    rows = (parameter.float() + factors.vectors[names[attribute]]).repeat_interleave(len(x) // factors.members, dim=0)
    return rows.view(len(x), *[1] * (x.dim() - 1 - parameter.dim()), *parameter.shape)


@contextmanager
def _swapped_weight(module, names, factors, called):
    """For the RMSNorm classes of transformers, whose formulas differ: let them compute with each row's own weight."""

    def before(module, args, kwargs):
        called(module)
        x = _first(args, kwargs)
        _refuse_other_rows(module, x, names, factors)
        module._parameters["weight"] = _of_each_row("weight", module, x, names, factors)

    def after(module, args, output):
        module._parameters["weight"] = weight
        return output.to(weight.dtype)

    weight = module._parameters["weight"]
    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        module._parameters["weight"] = weight
        for handle in handles:
            handle.remove()
