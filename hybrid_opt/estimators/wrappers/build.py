"""From the list of wrappers in a schedule file to an estimator within estimators. Next: `layer_subset.py`."""

from collections.abc import Sequence

from hybrid_opt.config.wrappers import (
    ControlVariate,
    LayerSubset,
    NormCap,
    RelativeSigma,
    ReplayedMomentum,
    SparseMask,
    Wrapper,
)
from hybrid_opt.estimators.contract import Estimator
from hybrid_opt.estimators.wrappers.control_variate import ControlVariateEstimator
from hybrid_opt.estimators.wrappers.layer_subset import LayerSubsetEstimator
from hybrid_opt.estimators.wrappers.momentum import MomentumEstimator
from hybrid_opt.estimators.wrappers.norm_cap import NormCapEstimator
from hybrid_opt.estimators.wrappers.relative_sigma import RelativeSigmaEstimator
from hybrid_opt.estimators.wrappers.sparse_mask import SparseMaskEstimator


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
            case RelativeSigma():
                estimator = RelativeSigmaEstimator(estimator, wrapper)
            case SparseMask():
                estimator = SparseMaskEstimator(estimator, wrapper)
            case ControlVariate():
                estimator = ControlVariateEstimator(estimator, wrapper)
    return estimator
