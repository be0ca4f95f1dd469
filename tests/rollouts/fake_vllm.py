"""A stand-in for the module vllm: the same calls and rules as vLLM 0.33 as far as the rollout needs them, computed by transformers
and peft, each prompt alone and without padding.

What it refuses or remembers as vLLM does: unknown arguments, other ranks than vLLM's, an adapter id that is known (the adapter that was
loaded first stays), adapters forgotten when weights are reloaded, no sleep unless it was enabled, no work while asleep.
"""

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: list = field(default_factory=list)
    stop_token_ids: list = field(default_factory=list)
    max_tokens: int = 16
    detokenize: bool = True

    def __post_init__(self):
        assert self.detokenize or not self.stop


class LLM:
    """Remembers its calls in `calls`; `started` holds all of its kind."""

    started: list = []

    def __init__(
        self,
        model,
        *,
        enable_lora=False,
        max_lora_rank=16,
        max_loras=1,
        dtype="auto",
        gpu_memory_utilization=0.92,
        enable_sleep_mode=False,
    ):
        if max_lora_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
            raise ValueError(f"max_lora_rank: {max_lora_rank}")
        self.arguments = {
            "max_lora_rank": max_lora_rank,
            "max_loras": max_loras,
            "dtype": dtype,
            "enable_lora": enable_lora,
        }
        self.arguments["gpu_memory_utilization"] = gpu_memory_utilization
        self.can_sleep, self.asleep = enable_sleep_mode, False
        self.place, self.calls = model, []
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._load(model)
        LLM.started.append(self)

    def _load(self, place):
        assert list(Path(place).glob("*.safetensors"))
        self.model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, self.arguments["dtype"])).eval()
        self.adapters = {}

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert not self.asleep
        assert (method, list(kwargs)) == ("reload_weights", ["weights_path"])
        self.calls.append("reload")
        self._load(kwargs["weights_path"])
        return [None]

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")
        return True

    def sleep(self, level=1):
        assert self.can_sleep
        assert not self.asleep
        self.asleep = True
        self.calls.append("sleep")

    def wake_up(self):
        assert self.asleep
        self.asleep = False
        self.calls.append("wake_up")

    def generate(self, prompts, sampling_params, *, use_tqdm=True, lora_request=None):
        assert not self.asleep
        self.calls.append("generate")
        self.prompts, self.params, self.requests = prompts, sampling_params, lora_request
        requests = lora_request or [None] * len(prompts)
        assert len(prompts) == len(sampling_params) == len(requests)
        rows = zip(prompts, sampling_params, requests, strict=True)
        return [SimpleNamespace(outputs=[self._one(p["prompt_token_ids"], *others)]) for p, *others in rows]

    def _with(self, request):
        if request is None:
            return self.model
        assert self.arguments["enable_lora"]
        if request.lora_int_id not in self.adapters:
            adapted = peft.PeftModel.from_pretrained(copy.deepcopy(self.model), request.lora_path)
            assert adapted.peft_config["default"].r <= self.arguments["max_lora_rank"]
            self.adapters[request.lora_int_id] = adapted.eval()
        return self.adapters[request.lora_int_id]

    @torch.no_grad()
    def _one(self, prompt, params, request):
        model, tokens = self._with(request), []
        generator = None if params.seed is None else torch.Generator().manual_seed(params.seed)
        while len(tokens) < params.max_tokens:
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].float()
            if params.temperature == 0:
                tokens.append(int(logits.argmax()))
            else:
                tokens.append(int((logits / params.temperature).softmax(-1).multinomial(1, generator=generator)))
            if tokens[-1] in params.stop_token_ids:
                return SimpleNamespace(token_ids=tuple(tokens), finish_reason="stop")
            if params.stop and any(stop in self.tokenizer.decode(tokens) for stop in params.stop):
                return SimpleNamespace(token_ids=tuple(tokens), finish_reason="stop")
        return SimpleNamespace(token_ids=tuple(tokens), finish_reason="length")


def install(monkeypatch) -> type[LLM]:
    """Let `import vllm` find this; returns its `LLM`."""
    request, lora, vllm = ModuleType("vllm.lora.request"), ModuleType("vllm.lora"), ModuleType("vllm")
    request.LoRARequest, lora.request = LoRARequest, request
    vllm.LLM, vllm.SamplingParams, vllm.lora = LLM, SamplingParams, lora
    for name, module in (("vllm", vllm), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(LLM, "started", [])
    return LLM
