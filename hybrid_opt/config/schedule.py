"""What a schedule file may say: estimators, a policy and a schedule, none of which knows the model.

One idea: a schedule file is complete in itself, so the same file serves every model, and every name used in it
is defined in it. Next: `run.py`, the file that puts a schedule to work on a model.
"""

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hybrid_opt.config.strict import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict

# ---------------------------------------------------------------- estimators

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
        if self.distinct_examples and self.fitness_shaping == "centered_rank":
            raise ValueError(
                "fitness_shaping 'centered_rank' compares members that see different examples (distinct_examples); write "
                "fitness_shaping: none or standardize"
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
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them (Hugging Face models)."""
    autocast: Literal["bfloat16"] | None = None
    """Run the forward pass under `torch.autocast` in this dtype."""

    @field_validator("optimizer_arguments")
    @classmethod
    def _learning_rate_has_one_place(cls, arguments):
        if "lr" in arguments:
            raise ValueError("'lr' belongs in learning_rate, not in optimizer_arguments")
        return arguments


Estimator = Annotated[EvolutionStrategy | Backprop, Field(discriminator="type")]

# ---------------------------------------------------------------- policy


class Rule(Strict):
    """Which estimators may move the parameters that this rule selects. The first rule that selects a parameter wins."""

    match: str | None = None
    """Regular expression searched for in the parameter's name."""
    layers: str | None = Field(
        None, json_schema_extra={"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]}
    )
    """Layer numbers instead of a regular expression: `20-29`, `7`, `first-2` or `last-4`."""
    use: tuple[str, ...] | Literal["frozen"]
    """Names of the estimators that may move the parameters, or `frozen`."""

    @field_validator("match")
    @classmethod
    def _is_regular_expression(cls, pattern):
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return pattern

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_are_readable(cls, layers):
        layers = str(layers) if isinstance(layers, int) and not isinstance(layers, bool) else layers
        if isinstance(layers, str) and not re.fullmatch(r"\d+(-\d+)?|(first|last)-[1-9]\d*", layers):
            raise ValueError(f"{layers!r} names no layers; write a number, a range such as 20-29, first-2 or last-4")
        if isinstance(layers, str) and layers[0].isdigit():
            first, _, last = layers.partition("-")
            if last and int(last) < int(first):
                raise ValueError(f"{layers!r} ends before it begins; write {last}-{first}")
        return layers

    @model_validator(mode="after")
    def _one_selector(self):
        if (self.match is None) == (self.layers is None):
            raise ValueError("a rule needs either match (a regular expression) or layers (such as 20-29)")
        if self.use == ():
            raise ValueError("use is empty; name the estimators that may move these parameters, or write: use: frozen")
        return self


# ---------------------------------------------------------------- schedules


class Single(Strict):
    """One estimator acts at every step."""

    type: Literal["single"]
    estimator: str
    """Name of the estimator."""


class Alternate(Strict):
    """Estimators take turns: each acts alone for its number of steps, in the order written, over and over."""

    type: Literal["alternate"]
    pattern: Annotated[dict[str, PositiveInt], Field(min_length=1)]
    """Steps of each estimator's turn, such as `{es: 9, backprop: 1}`."""


class Ramp(Strict):
    """A weight that moves in a straight line and then stays."""

    start: NonNegativeFloat
    """Weight at step 0."""
    end: NonNegativeFloat
    """Weight from step `over` on."""
    over: PositiveInt
    """Steps that the change takes."""


class Blend(Strict):
    """Several estimators act in the same step; their estimates are added with these weights."""

    type: Literal["blend"]
    weights: Annotated[dict[str, NonNegativeFloat | Ramp], Field(min_length=1)]
    """Weight of each estimator: a number or a ramp. An estimator whose weight is 0 rests."""

    @field_validator("weights")
    @classmethod
    def _somebody_always_acts(cls, weights):
        ramps = [w if isinstance(w, Ramp) else Ramp(start=w, end=w, over=1) for w in weights.values()]
        if all(ramp.start == 0 for ramp in ramps) or all(ramp.end == 0 for ramp in ramps):
            raise ValueError("all weights are 0 at the start or at the end, so no estimator would act")
        return weights


class Phase(Strict):
    """A stretch of the run with its own schedule and, where given, its own policy."""

    steps: PositiveInt | None = None
    """Length in steps."""
    tokens: PositiveInt | None = None
    """Length in tokens that the estimators have processed; the phase ends at the first step that reaches it."""
    schedule: Annotated[Single | Alternate | Blend, Field(discriminator="type")]
    """Who acts during the phase, with steps counted from its start."""
    policy: tuple[Rule, ...] | None = None
    """Replaces the file's policy during the phase."""


class Phases(Strict):
    """Schedules one after another."""

    type: Literal["phases"]
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    """The phases in order; the last one may leave out its length and then lasts to the end of the run."""

    @field_validator("phases")
    @classmethod
    def _lengths_are_clear(cls, phases):
        for number, phase in enumerate(phases):
            if phase.steps and phase.tokens:
                raise ValueError(f"phase {number} has a length both in steps and in tokens; keep one")
            if not (phase.steps or phase.tokens) and number < len(phases) - 1:
                raise ValueError(f"phase {number} has no length; give it steps or tokens (only the last may have none)")
        return phases


Schedule = Annotated[Single | Alternate | Blend | Phases, Field(discriminator="type")]


def acting_names(schedule: Single | Alternate | Blend | Phases) -> list[str]:
    """Names of the estimators that a schedule ever lets act, in order of first mention."""
    match schedule:
        case Single():
            names = [schedule.estimator]
        case Alternate():
            names = list(schedule.pattern)
        case Blend():
            names = list(schedule.weights)
        case Phases():
            names = [name for phase in schedule.phases for name in acting_names(phase.schedule)]
    return list(dict.fromkeys(names))


class ScheduleFile(Strict):
    """The whole of a schedule file."""

    description: str = ""
    """What the recipe is for, in a sentence."""
    estimators: Annotated[dict[str, Estimator], Field(min_length=1)]
    """The estimators, under names of your own."""
    policy: tuple[Rule, ...] | None = None
    """Ordered rules, parameter -> estimators; left out: every estimator may move every parameter."""
    schedule: Schedule
    """Who acts when."""

    @model_validator(mode="after")
    def _names_are_defined(self):
        for name in acting_names(self.schedule):
            self._known(name, "the schedule")
        phases = self.schedule.phases if isinstance(self.schedule, Phases) else ()
        for where, rules in [
            ("the policy", self.policy),
            *((f"the policy of phase {i}", p.policy) for i, p in enumerate(phases)),
        ]:
            for rule in rules or ():
                for name in () if rule.use == "frozen" else rule.use:
                    self._known(name, where)
        return self

    @model_validator(mode="after")
    def _one_backprop(self):
        names = [name for name, e in self.estimators.items() if isinstance(e, Backprop)]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} are both backprop, but there is one optimizer; keep one of them")
        return self

    def _known(self, name: str, where: str):
        if name not in self.estimators:
            near = difflib.get_close_matches(name, self.estimators, n=1, cutoff=0)
            raise ValueError(
                f"{where} names the estimator {name!r}, which is not defined; defined: "
                f"{', '.join(self.estimators)} (did you mean {near[0]!r}?)"
            )
