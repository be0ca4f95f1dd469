"""From an estimator's configuration to its perturbation. Next: `directions.py`, then `dense.py`, `low_rank.py`."""

from hybrid_opt.config.perturbations import DensePerturbation as DenseConfig
from hybrid_opt.config.perturbations import LazySubspace
from hybrid_opt.config.probing import Probing
from hybrid_opt.perturbations.contract import Perturbation
from hybrid_opt.perturbations.dense import DensePerturbation
from hybrid_opt.perturbations.forward_size import ForwardSize
from hybrid_opt.perturbations.low_rank import LowRankPerturbation
from hybrid_opt.perturbations.mixed_directions import directions_of
from hybrid_opt.perturbations.sides import LazySides


def build_perturbation(config: Probing) -> Perturbation:
    """The perturbation that an estimator's configuration describes."""
    members = None if config.members_per_forward == "auto" else config.members_per_forward
    size = ForwardSize(members, config.micro_batch_size)
    form = config.perturbation
    if isinstance(form, DenseConfig):
        directions = directions_of(form.distribution)
        return DensePerturbation(directions, config.sigma, whole_model=form.backup == "model", forward_size=size)
    sides = LazySides(form) if isinstance(form, LazySubspace) else form.noise_rank
    return LowRankPerturbation(sides, config.sigma, otherwise=form.otherwise, forward_size=size)
