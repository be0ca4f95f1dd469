"""What a run file may say about its engine: where the weights live. Next: `run.py`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from hybrid_opt.config.strict import NonNegativeInt, PositiveFloat, PositiveInt, Strict, Text

MasterWeights = Literal["fp32", "stochastic_rounding", "none"]


class LocalEngine(Strict):
    """One process, one device."""

    type: Literal["local"]
    device: str = "auto"
    """`auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    master_weights: MasterWeights = "fp32"
    """How small updates add up where the model's dtype is narrower than float32: in a float32 copy of the weights; by rounding
    each update up or down at random, seeded, without a copy (bfloat16 only); or not (rounded to the nearest value, a
    bfloat16 weight of 0.02 loses most of an update of 1e-5). The copy is the default because it loses nothing; it costs 4
    bytes a weight."""


class Offload(Strict):
    """Main memory as the place of what the device does not need all the time."""

    device: Literal["cpu", "none"] = "cpu"
    """`cpu`, or `none` to keep it on the device."""
    pin_memory: bool = False
    """Pin the memory, so that it is copied faster."""


class ZeroEngine(Strict):
    """DeepSpeed ZeRO: as many processes as the launcher starts, each on a device of its own."""

    type: Literal["zero"]
    zero_stage: Literal[1, 2, 3]
    """What each process holds only a part of: 1 the optimizer's state and master weights, 2 also gradients, 3 also the weights."""
    deepspeed_config: Text | dict[str, Any] | None = None
    """A DeepSpeed file (JSON), or its content, with further settings. What the run file settles it must not contradict; `auto` is filled in; what would write
    elsewhere or run code is refused."""
    micro_batch_size: PositiveInt | None = None
    """Most examples of a rank in a backward pass (DeepSpeed: train_micro_batch_size_per_gpu); null: as the backprop
    estimator says."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Backward passes in a step; null: the backprop estimator's accumulation."""
    gradient_clipping: PositiveFloat | None = None
    """Largest norm of the whole gradient; null: as the backprop estimator says."""
    bf16: bool | None = None
    """True: weights in bfloat16, with float32 masters; null: by the model's dtype."""
    fp16: bool | None = None
    """True: weights in float16, with float32 masters and loss scaling; null: by the model's dtype."""
    offload_optimizer: Offload | None = None
    """Where optimizer state and master weights are kept, and the optimizer steps."""
    offload_param: Offload | None = None
    """Where a rank's parts of the weights are kept while they are not used (stage 3)."""
    master_weights: MasterWeights = "fp32"
    """How small updates add up in narrow weights that backprop never owns, as for the local engine; those that it may own have
    DeepSpeed's float32 masters. A master costs 4 bytes a weight, at stages 1 and 2 on every rank."""
    offload_idle_after: PositiveInt | None = None
    """Steps without backprop after which optimizer state and gradient buffers leave the device until the next backprop step;
    null: they stay."""
    check_every: NonNegativeInt = 100
    """Steps between comparisons of the ranks' weights; 0: never."""
    consolidate: bool = True
    """Write the whole model as a Hugging Face folder into each checkpoint, from which a run with another number of ranks can
    start."""

    @model_validator(mode="after")
    def _offload_suits_stage(self) -> Self:
        if self.offload_param is not None and self.zero_stage != 3:
            raise ValueError(
                f"offload_param needs zero_stage 3 (stage {self.zero_stage} keeps whole weights on the device); write "
                "zero_stage: 3, or drop offload_param"
            )
        return self

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both true; keep one of them")
        return self


Engine = Annotated[LocalEngine | ZeroEngine, Field(discriminator="type")]
