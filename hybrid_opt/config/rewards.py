"""What a run file may say about rewards: the functions that judge completions, and how completions are generated.

Next: `run.py`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from hybrid_opt.config.strict import NonNegativeFloat, PositiveFloat, PositiveInt, Strict

FUNCTION = re.compile(r"\w+(\.\w+)*:\w+")
"""`module:function`."""
OWN_ARGUMENTS = frozenset({"model", "tokenizer", "enable_lora", "skip_tokenizer_init"})
"""Arguments of vLLM's `LLM` that nobody else may set."""


class RewardFunction(Strict):
    """One judge of completions, with TRL's signature: `def reward(prompts, completions, **columns) -> list[float]`."""

    function: str
    """A built-in scorer's name, or `module:function`, importable from the folder in which the command runs; it may be async, and is run only
    with `--allow-code`."""
    weight: float = 1.0
    """Factor of its rewards in the sum."""
    arguments: dict[str, Any] = {}
    """Further keyword arguments of every call."""


class Generation(Strict):
    """What writes completions, how it chooses tokens, and when it stops."""

    max_new_tokens: PositiveInt = 64
    """Most tokens of a completion."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; what the reward functions get ends before them."""
    temperature: NonNegativeFloat = 0.0
    """0: the likeliest token each time; above: sampled, with the same random numbers for every member."""
    top_k: PositiveInt | None = None
    """Sample among this many likeliest tokens; null: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the likeliest tokens that have this probability together."""
    engine: Literal["torch", "vllm"] = "torch"
    """What writes: the model itself, or vLLM, to which members are handed as LoRA adapters."""
    engine_arguments: dict[str, Any] = {}
    """Further arguments of vLLM's `LLM`, such as `{gpu_memory_utilization: 0.4, max_loras: 16, max_model_len: 2048}`, or
    `enable_sleep_mode: true` (it leaves the GPU between its turns) and `dtype: bfloat16` (for a model in float32). Texts, lists and mappings
    may be code to vLLM, and need `--allow-code`."""

    @model_validator(mode="after")
    def _options_suit(self) -> Self:
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise ValueError(
                "top_k and top_p are for sampling, but temperature is 0; write a temperature, or drop them"
            )
        if self.engine_arguments and self.engine != "vllm":
            raise ValueError("engine_arguments are vLLM's; write engine: vllm, or drop them")
        if own := sorted(OWN_ARGUMENTS & self.engine_arguments.keys()):
            raise ValueError(
                f"engine_arguments.{own[0]} follows from the model section and the rewards; drop it (members are LoRA adapters of the "
                "model that is trained)"
            )
        if "" in self.stop:
            raise ValueError("stop holds an empty text, which would end every completion at once; drop it")
        return self


class Reward(Strict):
    """Negative sum of weighted rewards of what the model writes after the prompt; it has no gradient."""

    type: Literal["reward"]
    rewards: Annotated[tuple[RewardFunction, ...], Field(min_length=1)]
    """Who judges; their weighted rewards are added."""
    on_error: Literal["worst", "zero", "stop"] = "worst"
    """A reward that is not finite, missing, late or raised: take the worst of the step, take 0, or end the run."""
    timeout: PositiveFloat = 60.0
    """Most seconds for one call of a reward function."""
    generation: Generation = Generation()
    """How completions are written."""
