"""What a schedule file may say about its estimators: how each finds a direction and how far it steps. Next: `schedule.py`.

One idea: an estimator's options are one frozen object, and what they cannot mean together is refused, never changed.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hybrid_opt.config.strict import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict

LearningRateScheduleName = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "inverse_sqrt",
]


class LearningRate(Strict):
    """The step length of one estimator: a peak value and its course over the run."""

    learning_rate: PositiveFloat
    """Peak learning rate."""
    learning_rate_schedule: LearningRateScheduleName = "constant"
    """Course of the learning rate over the steps of the whole run, by transformers' name for it."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises from 0 (not for `constant`)."""

    @model_validator(mode="after")
    def _constant_has_no_warmup(self):
        if self.learning_rate_schedule == "constant" and self.warmup_steps:
            raise ValueError(
                "learning_rate_schedule 'constant' has no warm-up; write 'constant_with_warmup' or drop warmup_steps"
            )
        return self


class DensePerturbation(Strict):
    """Every weight gets a noise value of its own; one member is evaluated at a time with perturbed weights."""

    type: Literal["dense"]
    distribution: Literal["gaussian", "rademacher"] = "gaussian"
    """Distribution of a noise value: standard normal, or -1 and +1 with equal probability."""
    backup: Literal["layer", "model"] = "layer"
    """Perturb each module while it runs, or write the whole model for each member and keep a copy of it: more memory, and
    faster where a member's evaluation calls the model many times, such as in generation."""


class LowRankPerturbation(Strict):
    """Matrices get `B A^T / sqrt(noise_rank)`; many members share one forward pass and weights are never written."""

    type: Literal["low_rank"]
    noise_rank: PositiveInt = 1
    """Rank r of a matrix's perturbation (vectors always get full noise)."""
    otherwise: Literal["refuse", "dense", "frozen"] = "refuse"
    """What to do with a parameter that cannot be evaluated low rank (`hybrid-opt check` lists them): an error, dense noise
    and one member a forward pass, or no noise and no update."""


class SgdRule(Strict):
    """`w <- w - learning_rate * g`."""

    type: Literal["sgd"]


class MomentumRule(Strict):
    """`m <- beta m + g; w <- w - learning_rate * m` (torch's SGD with momentum)."""

    type: Literal["momentum"]
    beta: Decay = 0.9
    """Decay of the running sum m."""


class AdamRule(Strict):
    """Adam with bias correction (Kingma & Ba, arXiv 1412.6980)."""

    type: Literal["adam"]
    beta1: Decay = 0.9
    """Decay of the first moment."""
    beta2: Decay = 0.999
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


class EvolutionStrategy(LearningRate):
    """Gradient estimate from forward passes at a population of perturbed weights."""

    type: Literal["es"]
    population_size: Annotated[int, Field(ge=2)] = 16
    """Number of members N evaluated in a step."""
    sigma: PositiveFloat = 1e-3
    """Standard deviation of the perturbation of a weight."""
    antithetic: bool = True
    """Evaluate each noise direction with both signs."""
    fitness_shaping: Literal["none", "standardize", "centered_rank"] = "standardize"
    """How members' losses become weights w."""
    perturbation: Annotated[DensePerturbation | LowRankPerturbation, Field(discriminator="type")] = LowRankPerturbation(
        type="low_rank"
    )
    """Form of the noise."""
    group_baseline: Literal["none", "mean", "standardize"] = "none"
    """Before a member's losses are averaged, compare each with the other members' on the same example: `mean` takes their mean off,
    `standardize` divides by their standard deviation too (GRPO) and leaves out examples on which all agree."""
    divide_by_sigma: bool = True
    """True: the estimate is `1/(N sigma) sum w eps` (gradient units); False: `1/N sum w eps` (EA4LLM, ES at Scale)."""
    members_per_forward: PositiveInt | Literal["auto"] = "auto"
    """Members that share one forward pass (low rank only; dense evaluates one at a time). `auto`: as many as make it
    efficient and fit in the free memory."""
    micro_batch_size: PositiveInt | None = None
    """Most examples of a member in a forward pass; null: all, as far as they fit in the free memory."""
    examples_per_step: PositiveInt | None = None
    """Examples that a member sees, drawn from the step's batch without replacement; null: all of it (with
    distinct_examples an even share)."""
    distinct_examples: bool = False
    """True: each antithetic pair sees examples of its own, so the same forward passes cover more data; False: all members
    see the same ones."""
    update: Annotated[SgdRule | MomentumRule | AdamRule, Field(discriminator="type")] = SgdRule(type="sgd")
    """Rule that turns this estimator's estimate into a change of the weights, its state held in float32."""
    anchor: NonNegativeFloat = 0.0
    """Strength of a pull back to the weights at the start: adds `anchor / 2 |w - w_start|^2` to what is minimised (L2-SP, arXiv
    1802.01483), and keeps a copy of them in main memory."""

    @model_validator(mode="after")
    def _population_suits_options(self):
        n = self.population_size
        if self.antithetic and n % 2:
            raise ValueError(
                f"population_size {n} is odd, but antithetic members come in pairs; write {n + 1}, or antithetic: false"
            )
        if self.distinct_examples and not self.antithetic:
            raise ValueError(
                "distinct_examples compares the two members of a pair on the same examples, so it needs antithetic: true"
            )
        if self.distinct_examples and self.fitness_shaping == "centered_rank" and self.group_baseline == "none":
            raise ValueError(
                "fitness_shaping 'centered_rank' compares members that see different examples (distinct_examples); write "
                "fitness_shaping: none or standardize, or group_baseline: mean"
            )
        if self.fitness_shaping == "standardize" and n < 5:
            raise ValueError(
                f"population_size {n} is too small to standardize (with 4 or fewer members the weights hardly depend "
                "on the losses); write 6 or more, or fitness_shaping: none"
            )
        return self


TorchOptimizerName = Literal[
    "ASGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]


class Backprop(LearningRate):
    """Exact gradient of the mean loss by backpropagation, applied by a torch optimizer."""

    type: Literal["backprop"]
    optimizer: TorchOptimizerName = "AdamW"
    """A class of `torch.optim`."""
    optimizer_arguments: dict[str, Any] = {}
    """Further arguments of the optimizer, such as `{weight_decay: 0.1}`."""
    gradient_clipping: PositiveFloat | None = None
    """Largest norm of the whole gradient; null: no clipping."""
    accumulation: PositiveInt = 1
    """Parts into which a batch is split, one backward pass each; the gradient is that of the whole batch."""
    micro_batch_size: PositiveInt | None = None
    """Most examples in a backward pass (on each rank), instead of accumulation; null: as accumulation says."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them (Hugging Face models)."""
    autocast: Literal["bfloat16"] | None = None
    """Run the forward pass under `torch.autocast` in this dtype."""
    anchor: NonNegativeFloat = 0.0
    """Strength of a pull back to the weights at the start: adds `anchor / 2 |w - w_start|^2` to what is minimised (L2-SP, arXiv
    1802.01483), and keeps a copy of them in main memory."""

    @model_validator(mode="after")
    def _one_split(self):
        if self.micro_batch_size is not None and self.accumulation > 1:
            raise ValueError("accumulation and micro_batch_size both say how a batch is split; keep one of them")
        return self

    @field_validator("optimizer_arguments")
    @classmethod
    def _learning_rate_has_one_place(cls, arguments):
        if "lr" in arguments:
            raise ValueError("'lr' belongs in learning_rate, not in optimizer_arguments")
        return arguments


class StaleGradient(LearningRate):
    """The latest gradient that backprop took, once more, without any forward pass: what ES steps must be better than."""

    type: Literal["stale_gradient"]
    update: Annotated[SgdRule | MomentumRule | AdamRule, Field(discriminator="type")] = SgdRule(type="sgd")
    """Rule that turns the gradient, before any clipping, into a change of the weights, its state held in float32."""


Estimator = Annotated[EvolutionStrategy | Backprop | StaleGradient, Field(discriminator="type")]
