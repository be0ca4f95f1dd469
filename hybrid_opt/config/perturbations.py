"""Forms of noise that a schedule file may choose: how a random direction changes the weights. Next: `probing.py`."""

from typing import Annotated, Literal

from pydantic import Field

from hybrid_opt.config.strict import PositiveInt, Strict


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


Perturbation = Annotated[DensePerturbation | LowRankPerturbation, Field(discriminator="type")]
