"""Estimators that evaluate the loss at perturbed weights, and no gradient. Next: `align.py`.

One idea: they differ in how losses become coefficients of directions; how directions are drawn and evaluated is common to all.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from hybrid_opt.config.perturbations import DensePerturbation, LowRankPerturbation, Perturbation
from hybrid_opt.config.steps import DirectStep
from hybrid_opt.config.strict import Number, PositiveFloat, PositiveInt, Share
from hybrid_opt.config.wrappers import RelativeSigma, SparseMask, Wrapper


class Probing(DirectStep):
    """What estimators have in common that evaluate the loss at perturbed weights, called members."""

    draws_noise: ClassVar[bool] = True

    sigma: PositiveFloat = 1e-3
    """Standard deviation of the perturbation of a weight."""
    perturbation: Perturbation = LowRankPerturbation(type="low_rank")
    """Form of the noise."""
    members_per_forward: PositiveInt | Literal["auto"] = "auto"
    """Members that share one forward pass (low rank only; dense evaluates one at a time). `auto`: as many as make it
    efficient and fit in the free memory."""
    micro_batch_size: PositiveInt | None = None
    """Most examples of a member in a forward pass; null: all, as far as they fit in the free memory."""
    examples_per_step: PositiveInt | None = None
    """Examples that a member sees, drawn from the step's batch without replacement; null: all of it (with
    distinct_examples an even share)."""
    max_nonfinite: Share = 0.5
    """A step is skipped in which a larger share of the members has a loss that is not finite. Below that such a member is the worst of
    the step where members are ranked or standardized, and where their losses make slopes it and its partner count for nothing."""

    @property
    def directions_from_keys(self) -> bool:
        """See `DirectStep`: unless the perturbation says otherwise."""
        return self.perturbation.directions_from_keys

    def unsuited(self, wrapper: Wrapper) -> str:
        """See `DirectStep.unsuited`: a mask needs noise with a value for each weight."""
        if isinstance(wrapper, SparseMask) and not isinstance(self.perturbation, DensePerturbation):
            return (
                f"{self.perturbation.type} noise of which single values are picked is low rank no more; write perturbation: "
                "{type: dense}, or take sparse_mask off"
            )
        return ""

    def examples(self, batch_size: int) -> int:
        """Examples that a member sees."""
        return self.examples_per_step or batch_size // self.example_groups

    @property
    def directions(self) -> int:
        """Noise directions a step."""
        return self.forwards // 2

    def keeps(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """See `DirectStep.keeps`; and what the perturbation keeps."""
        return super().keeps(shapes) | self.passing(shapes)

    def passing(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """See `LearningRate.passing`: what the perturbation keeps."""
        return self.perturbation.keeps(shapes, self.directions)


class EvolutionStrategy(Probing):
    """Gradient estimate from forward passes at a population of perturbed weights."""

    type: Literal["es"]
    population_size: Annotated[int, Number, Field(ge=2)] = 16
    """Number of members N evaluated in a step."""
    antithetic: bool = True
    """Evaluate each noise direction with both signs."""
    fitness_shaping: Literal["none", "standardize", "centered_rank", "leave_one_out"] = "standardize"
    """How members' losses become weights w. `leave_one_out` takes off each loss the mean of the other members'."""
    group_baseline: Literal["none", "mean", "standardize"] = "none"
    """Before a member's losses are averaged, compare each with the other members' on the same example: `mean` takes their mean off,
    `standardize` divides by their standard deviation too (GRPO) and leaves out examples on which all agree."""
    divide_by_sigma: bool = True
    """True: the estimate is `1/(N sigma) sum w eps` (gradient units); False: `1/N sum w eps` (EA4LLM, ES at Scale)."""
    distinct_examples: bool = False
    """True: each antithetic pair sees examples of its own, so the same forward passes cover more data; False: all members
    see the same ones."""

    @model_validator(mode="after")
    def _population_suits_options(self) -> Self:
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

    @property
    def ranks_members(self) -> bool:
        """Whether members' losses only place them among each other, on the same examples, so that one which is not finite is simply the
        worst. Elsewhere the largest loss of others would be a slope that nobody has seen."""
        is_relative = self.fitness_shaping in ("standardize", "centered_rank") or self.group_baseline == "standardize"
        return is_relative and not self.distinct_examples

    @property
    def forwards(self) -> int:
        """One a member."""
        return self.population_size

    @property
    def directions(self) -> int:
        """One a member, or a pair."""
        return self.population_size // (2 if self.antithetic else 1)

    @property
    def example_groups(self) -> int:
        """One a pair with `distinct_examples`."""
        return self.population_size // 2 if self.distinct_examples else 1


class Spsa(Probing):
    """Slopes along q random directions (Spall 1992; MeZO, arXiv 2305.17333): 2 q forward passes a step, and no memory."""

    type: Literal["spsa"]
    pairs: PositiveInt = 1
    """Number of directions q; their estimates are averaged."""
    curvature_floor: PositiveFloat | None = None
    """Divide each slope by the size of the curvature along its direction, or by this if that is smaller; null: do not. One forward pass
    more, at the weights as they are. A curvature is a sum over all weights, and in float32 it is known to about
    `5e-7 loss / sigma^2`: choose sigma so that this is less than the floor. The estimate then has no gradient units, but those of weights:
    learning_rate 1 with one pair is a Newton step along its direction."""

    def unsuited(self, wrapper: Wrapper) -> str:
        """See `DirectStep.unsuited`."""
        if self.curvature_floor and isinstance(wrapper, RelativeSigma):
            return (
                "a step that is divided by the curvature goes along the direction that is evaluated, and relative_sigma adds up another; drop "
                "curvature_floor, or take relative_sigma off"
            )
        return super().unsuited(wrapper)

    @property
    def forwards(self) -> int:
        """Two a pair, and one for the curvatures."""
        return 2 * self.pairs + (self.curvature_floor is not None)

    @property
    def directions(self) -> int:
        """One a pair."""
        return self.pairs
