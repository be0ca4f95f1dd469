"""All checks, in the order of the table. Next: `subject.py`.

One idea: a check is a function that yields rows, and its docstring says which law they hold it to and where that is from.
"""

from collections.abc import Callable, Iterator

from hybrid_opt.studies.verify import descent, errors, exactness, guided, guided_toy, independence, rounding, shaping
from hybrid_opt.studies.verify.quantity import Quantity
from hybrid_opt.studies.verify.sampling import Trials

Check = Callable[[Trials], Iterator[Quantity]]

CHECKS: tuple[Check, ...] = (
    errors.mean_square_errors,
    errors.low_rank_errors,
    errors.forward_gradient_errors,
    errors.cosine_and_shrinkage,
    errors.averaging,
    errors.projection,
    guided.exact_probes,
    guided.mixed_covariance,
    guided.threshold,
    guided_toy.published_toy,
    shaping.second_moments,
    shaping.loss_variance,
    shaping.normalised_step,
    descent.one_step_descent,
    descent.curvature,
    independence.same_shaped_layers,
    independence.members_and_steps,
    exactness.restored_weights,
    exactness.tied_weights,
    exactness.forward_slopes,
    rounding.rounded_updates,
)


def measured(trials: Trials, show: Callable[[str], None]) -> Iterator[Quantity]:
    """The rows of all checks.

    Args:
        show: is told which check is going on.
    """
    for check in CHECKS:
        show(check.__name__.replace("_", " "))
        yield from check(trials)
