"""Members as LoRA adapters, for an engine that serves many adapters of one model. Next: `served_weights.py`.

One idea: low rank noise is a LoRA adapter. PEFT computes `x W^T + alpha/r (x lora_A^T) lora_B^T`, and a member's weights are
`W + scale B^T A` with its sign times sigma as `scale`; so lora_A is A, lora_B is `scale B^T`, and alpha is r.
Source of the file format: PEFT's `LoraConfig` and `save_pretrained`.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hybrid_opt.errors import UserError
from hybrid_opt.perturbations.factors import Factors
from hybrid_opt.perturbations.swapping import owners_of

PREFIX = "base_model.model."
"""What PEFT puts before the names of the model's modules."""


def export_adapters(model: nn.Module, factors: Factors, folder: Path) -> list[Path]:
    """Write each member's noise as a PEFT LoRA adapter: `adapter_config.json` and `adapter_model.safetensors`.

    Tensors are in the dtype that hooks compute the weight's noise in, its own; `scale B` is rounded to it once.

    Args:
        folder: an existing folder; a folder for each member comes into it.

    Returns:
        The members' folders, in the members' order: direction by direction.

    Raises:
        UserError: one of the parameters has noise that an adapter cannot carry.
    """
    names = factors.matrices.keys() | factors.vectors.keys()
    refuse_what_adapters_cannot_carry(model, names)
    modules = _linear_modules(model, names)
    members = _members(modules, factors)
    config = json.dumps(_config(modules, next(iter(factors.matrices.values()))[0].shape[1]), indent=2)
    paths = [folder / f"member-{i}" for i in range(factors.scale.numel())]
    for path, tensors in zip(paths, members, strict=True):
        path.mkdir()
        (path / "adapter_config.json").write_text(config)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return paths


def refuse_what_adapters_cannot_carry(model: nn.Module, names: Collection[str]) -> None:
    """Say which of the parameters that get noise is not the matrix of a linear layer, and how to freeze all such.

    Raises:
        UserError: there is one, or none is left, or the model has adapters already.
    """
    refuse_adapted(model)
    reasons = why_no_adapter(model, names)
    if reasons:
        name, reason = next(iter(reasons.items()))
        others = f" (nor those of {len(reasons) - 1} others)" if len(reasons) > 1 else ""
        raise UserError(
            f"objective.generation.engine: a LoRA adapter cannot carry the noise of parameter {name}{others}, because {reason}; "
            f"put the rule {{match: '{_pattern(reasons, names)}', use: frozen}} first in the policy (or use: the name of a "
            "backprop estimator), or write engine: torch"
        )
    if not names:
        raise UserError(
            "policy: no parameter gets noise, so all members are the same; let es have some matrices of linear layers"
        )


def refuse_adapted(model: nn.Module) -> None:
    """An adapter of an adapter is nothing that can be handed over.

    Raises:
        UserError: the model has adapters of its own.
    """
    if hasattr(model, "peft_config"):
        raise UserError(
            "peft: members are handed to vLLM as adapters, and this model has adapters of its own; drop the peft section, or write "
            "engine: torch in objective.generation"
        )


def why_no_adapter(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """The parameters whose noise an adapter cannot carry, in the model's order, each with the reason.

    Embeddings are among them: PEFT could, but engines serve adapters of embeddings for a few architectures only, and not where
    the head is tied to them.
    """
    reasons = {}
    for module, owned in owners_of(model, _parameters(model, names)).items():
        for attribute, name in owned.items():
            if attribute != "weight":
                reasons[name] = f"it is the {attribute} of a {type(module).__name__} module"
            elif not _is_linear(module):
                reasons[name] = f"it belongs to a {type(module).__name__} module and not to a linear layer"
    return reasons


def _parameters(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name in names}


def _is_conv1d(module: nn.Module) -> bool:
    """Transformers' Conv1D, whose weight is (in, out), the transpose of a Linear's."""
    return type(module).__name__ == "Conv1D"


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward or _is_conv1d(module)


def _pattern(refused: Mapping[str, str], names: Collection[str]) -> str:
    """A regular expression for a policy rule that finds all refused names and none of the others."""
    ends = {"bias" if name.endswith(".bias") else ".".join(name.split(".")[-2:]) for name in refused}
    pattern = rf"(^|\.)({'|'.join(re.escape(end) for end in sorted(ends))})$"
    if any(re.search(pattern, name) for name in names if name not in refused):
        pattern = f"^({'|'.join(map(re.escape, refused))})$"
    return pattern


def _linear_modules(model: nn.Module, names: Collection[str]) -> dict[str, tuple[str, bool]]:
    """For each module's name the name of its weight, and whether that is (in, out). A tied weight has several modules."""
    owners = owners_of(model, _parameters(model, names))
    paths = {module: path for path, module in model.named_modules()}
    return {paths[module]: (owned["weight"], _is_conv1d(module)) for module, owned in owners.items()}


def _members(modules: Mapping[str, tuple[str, bool]], factors: Factors) -> list[dict[str, Tensor]]:
    """The tensors of each member's adapter, in main memory."""
    members: list[dict[str, Tensor]] = [{} for _ in range(factors.scale.numel())]
    each = factors.scale.shape[1]
    for path, (name, is_in_out) in modules.items():
        a, b = factors.matrices[name]
        lora_a, lora_b = _lora(b, a, factors.scale) if is_in_out else _lora(a, b, factors.scale)
        for i, tensors in enumerate(members):
            tensors[f"{PREFIX}{path}.lora_A.weight"] = lora_a[i // each]
            tensors[f"{PREFIX}{path}.lora_B.weight"] = lora_b[i]
    return members


def _lora(inner: Tensor, outer: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """lora_A (directions, r, in) of each direction and lora_B (members, out, r) of each member, for noise of the input's side
    (directions, r, in) and the output's side (directions, r, out); scale: (directions, members of each)."""
    scaled = torch.einsum("dm,dro->dmor", scale, outer.float()).to(outer.dtype).flatten(0, 1)
    return inner.cpu().contiguous(), scaled.cpu().contiguous()


def _config(modules: Mapping[str, tuple[str, bool]], rank: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(modules),
        "fan_in_fan_out": any(is_in_out for _, is_in_out in modules.values()),
        "inference_mode": True,
    }
