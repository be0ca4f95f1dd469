"""From an estimator's configuration to the estimator. Next: `es.py`."""

from hybrid_opt.config.estimators import Backprop, EvolutionStrategy, StaleGradient
from hybrid_opt.config.estimators import Estimator as EstimatorConfig
from hybrid_opt.estimators.backprop import BackpropEstimator
from hybrid_opt.estimators.contract import Estimator
from hybrid_opt.estimators.es import EsEstimator
from hybrid_opt.estimators.stale_gradient import StaleGradientEstimator


def build_estimator(config: EstimatorConfig) -> Estimator:
    """The estimator that a configuration describes."""
    match config:
        case EvolutionStrategy():
            return EsEstimator(config)
        case Backprop():
            return BackpropEstimator(config)
        case StaleGradient():
            return StaleGradientEstimator()
