"""From the list of wrappers in a schedule file to an estimator within estimators. Next: `layer_subset.py`."""

from collections.abc import Sequence

from hybrid_opt.config.wrappers import LayerSubset, NormCap, ReplayedMomentum, Wrapper
from hybrid_opt.estimators.contract import Estimator
from hybrid_opt.estimators.wrappers.layer_subset import LayerSubsetEstimator
from hybrid_opt.estimators.wrappers.momentum import MomentumEstimator
from hybrid_opt.estimators.wrappers.norm_cap import NormCapEstimator


def wrapped(estimator: Estimator, wrappers: Sequence[Wrapper]) -> Estimator:
    """The estimator with its wrappers around it, the first one innermost."""
    for wrapper in wrappers:
        match wrapper:
            case LayerSubset():
                estimator = LayerSubsetEstimator(estimator, wrapper)
            case NormCap():
                estimator = NormCapEstimator(estimator, wrapper)
            case ReplayedMomentum():
                estimator = MomentumEstimator(estimator, wrapper)
    return estimator
