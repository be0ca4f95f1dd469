"""Completions from vLLM, which serves each member as a LoRA adapter of the model's weights. Next:
`served_weights.py`.

One idea: vLLM is a copy of the model in a process of its own. Token ids and seeds go in, token ids come out, and what it computes
with lies in folders: the weights when they have changed, the adapters of the members that are being evaluated.
Written for vLLM 0.33: `LLM.generate`, and its workers' `reload_weights(weights_path=...)`, which knows of layers with adapters.
"""

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hybrid_opt.config.rewards import Generation
from hybrid_opt.engines.ranks import launched_world_size
from hybrid_opt.errors import UserError
from hybrid_opt.perturbations.factors import Factors, active_factors
from hybrid_opt.perturbations.swapping import modules_swap_weights
from hybrid_opt.rollouts.adapters import export_adapters, refuse_adapted
from hybrid_opt.rollouts.contract import Completions, end_tokens
from hybrid_opt.rollouts.served_weights import checksum, new_folder, weight_bytes, written

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank`; the memory for less than 8 is not worth telling apart."""
DEFAULTS = {"max_loras": 8, "gpu_memory_utilization": 0.5}
"""Adapters in a batch of vLLM's, and its share of the GPU's memory; the model that is trained lives there too."""


class VllmRollout:
    """Writes completions with vLLM, in one process with one GPU or more (`engine_arguments: {tensor_parallel_size: 2}`).

    vLLM starts at the first call, with the weights that the model has then. Its random numbers are not torch's: sampled completions
    differ from those of `engine: torch`, likeliest ones where two tokens are all but equally likely.

    Args:
        config: how to choose tokens and when to stop; `engine_arguments` go to vLLM's `LLM`.
        tokenizer: the model's.

    Raises:
        UserError: vLLM is not installed, or there are several processes.
    """

    def __init__(self, config: Generation, tokenizer: PreTrainedTokenizerBase) -> None:
        if launched_world_size() > 1:
            raise UserError(
                "objective.generation.engine: vllm serves a run of one process, and there are several; start one (vLLM itself may use "
                "several GPUs: engine_arguments: {tensor_parallel_size: 2}), or write engine: torch"
            )
        self.config, self.tokenizer = config, tokenizer
        self._vllm = _library()
        self._llm: Any = None
        self._most_rank = 0  # of the adapters that vLLM was started for
        self._served: tuple[int, ...] = ()  # checksum of the weights that vLLM has
        self._home: TemporaryDirectory | None = None  # where vLLM finds the model
        self._members: _Members | None = None
        self._ids = itertools.count(1)  # vLLM takes an id that it knows for the adapter that it knows

    def complete(self, model: nn.Module, batch: dict[str, Any]) -> Completions:
        """See `Rollout.complete`.

        Raises:
            UserError: the members' noise is not low rank noise of linear layers alone, or vLLM cannot serve the model.
        """
        if modules_swap_weights():
            raise UserError(
                "objective.generation.engine: dense noise exists only while the model's own modules run, so vLLM cannot see it; write "
                "perturbation: {type: low_rank} without otherwise: dense, or {type: dense, backup: model}, or engine: torch"
            )
        refuse_adapted(model)
        factors = active_factors()
        ends, prompts = end_tokens(model, self.tokenizer), _prompts(batch["input_ids"], batch["attention_mask"])
        parts = 1 if factors is None else factors.scale.numel()
        with self._serving(model, factors):
            outputs = self._llm.generate(
                prompts,
                self._sampling(_seeds(batch, len(prompts) // parts), ends),
                use_tqdm=False,
                lora_request=self._adapters(model, factors, len(prompts)),
            )
        written = [output.outputs[0] for output in outputs]
        return Completions(
            [_without_end(list(one.token_ids), ends) for one in written],
            [one.finish_reason == "stop" for one in written],
        )

    def close(self) -> None:
        """Let vLLM end, and remove what was written for it."""
        for folder in (self._home, self._members and self._members.folder):
            if folder:
                folder.cleanup()
        self._llm = self._home = self._members = None

    @contextmanager
    def _serving(self, model: nn.Module, factors: Factors | None) -> Iterator[None]:
        """Inside, vLLM is awake and has the model's weights of now."""
        sleeps = self.config.engine_arguments.get("enable_sleep_mode", False)
        if self._llm is not None and sleeps:
            self._llm.wake_up()
        try:
            self._update(model, factors)
            yield
        finally:
            if self._llm is not None and sleeps:
                self._llm.sleep(level=1)  # its weights move to main memory

    def _update(self, model: nn.Module, factors: Factors | None) -> None:
        now = checksum(model)
        if self._llm is not None and now == self._served:
            return
        if self._home is None:
            self._home = new_folder(weight_bytes(model))
        with written(model, self.tokenizer, Path(self._home.name)):
            if self._llm is None:
                self._llm = self._start(model, self._home.name, factors)
            else:
                self._llm.collective_rpc("reload_weights", kwargs={"weights_path": self._home.name})
                self._llm.reset_prefix_cache()  # keys and values of the weights before
        self._served = now

    def _start(self, model: nn.Module, place: str, factors: Factors | None) -> Any:
        rank = max((a.shape[1] for a, _ in factors.matrices.values()), default=1) if factors else 1
        arguments = {
            **DEFAULTS,
            "dtype": _dtype(model, self.config.engine_arguments),
            "max_lora_rank": next((r for r in RANKS if r >= rank), RANKS[-1]),
            **self.config.engine_arguments,
        }
        self._most_rank = arguments["max_lora_rank"]
        try:
            return self._vllm.LLM(model=place, enable_lora=True, **arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"objective.generation.engine: vLLM does not start with this model and engine_arguments: {' '.join(str(error).split())}"
            ) from error

    def _adapters(self, model: nn.Module, factors: Factors | None, rows: int) -> list[Any] | None:
        """An adapter for each row, member-major; None: the weights as they are."""
        if factors is None:
            return None
        if self._members is None or self._members.factors() is not factors:  # else more examples of the same members
            self._members = self._export(model, factors)
        return [request for request in self._members.requests for _ in range(rows // len(self._members.requests))]

    def _export(self, model: nn.Module, factors: Factors) -> "_Members":
        if (rank := max((a.shape[1] for a, _ in factors.matrices.values()), default=1)) > self._most_rank:
            raise UserError(
                f"objective.generation.engine_arguments.max_lora_rank: vLLM was started for adapters of rank {self._most_rank} at most, "
                f"but noise_rank is {rank}; write {next((r for r in RANKS if r >= rank), RANKS[-1])}"
            )
        size = sum(side.nbytes for sides in factors.matrices.values() for side in sides) * factors.scale.shape[1]
        folder = new_folder(size)
        weakref.finalize(factors, folder.cleanup)  # vLLM may load an adapter anew as long as its member is evaluated
        numbers = ((next(self._ids), path) for path in export_adapters(model, factors, Path(folder.name)))
        return _Members(
            weakref.ref(factors), folder, [self._request(f"member-{n}", n, str(path)) for n, path in numbers]
        )

    def _request(self, name: str, number: int, path: str) -> Any:
        return self._vllm.lora.request.LoRARequest(name, number, path)

    def _sampling(self, seeds: Sequence[int], ends: Sequence[int]) -> list[Any]:
        """How each row's tokens are chosen; the numbers that vLLM draws follow from the row's seed."""
        config = self.config
        shared = {
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_k": config.top_k or 0,
            "top_p": config.top_p,
            "stop": list(config.stop),
            "stop_token_ids": ends,
            "detokenize": bool(config.stop),  # texts are only needed to look for stop strings
        }
        return [self._vllm.SamplingParams(**shared, seed=seed if config.temperature else None) for seed in seeds]


@dataclass(frozen=True)
class _Members:
    """The adapters of the members that share a forward pass."""

    factors: weakref.ref
    folder: TemporaryDirectory
    requests: Sequence[Any]
    """vLLM's `LoRARequest` of each member."""


def _library() -> ModuleType:
    try:
        import vllm  # only who uses it needs it
        import vllm.lora.request
    except ImportError as error:
        raise UserError(
            f"objective.generation.engine: vllm cannot be imported ({error}); pip install 'hybrid-opt[vllm]', or write engine: torch"
        ) from None
    return vllm


def _dtype(model: nn.Module, arguments: Mapping[str, Any]) -> str:
    """The model's dtype by vLLM's name.

    Raises:
        UserError: it is one that vLLM's kernels for adapters do not take, and the arguments do not name another.
    """
    name = str(next(model.parameters()).dtype).removeprefix("torch.")
    if "dtype" not in arguments and name not in ("bfloat16", "float16"):
        raise UserError(
            f"model.dtype: vLLM computes adapters in bfloat16 or float16, and the model is in {name}; write dtype: bfloat16, or "
            "engine_arguments: {dtype: bfloat16} in objective.generation to round for completions alone"
        )
    return name


def _prompts(ids: Tensor, mask: Tensor) -> list[dict[str, list[int]]]:
    """Token ids of each row without its padding, as vLLM wants them."""
    rows = zip(ids.tolist(), mask.tolist(), strict=True)
    return [{"prompt_token_ids": [token for token, is_there in zip(*row, strict=True) if is_there]} for row in rows]


def _seeds(batch: dict[str, Any], rows_of_each: int) -> list[int]:
    """Each row's seed; without `seeds` its place among its member's rows, so that members still draw the same numbers."""
    if "seeds" in batch:
        return [seed & torch.iinfo(torch.int64).max for seed in batch["seeds"].tolist()]  # vLLM takes -1 for none
    return [row % rows_of_each for row in range(len(batch["input_ids"]))]


def _without_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens
