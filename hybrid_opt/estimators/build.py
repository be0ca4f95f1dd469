"""From an estimator's configuration to the estimator with its wrappers. Next: `es.py`."""

from hybrid_opt.config.align import Align
from hybrid_opt.config.estimators import Backprop, StaleGradient
from hybrid_opt.config.estimators import Estimator as EstimatorConfig
from hybrid_opt.config.forward_gradient import ForwardGradient
from hybrid_opt.config.fzoo import Fzoo
from hybrid_opt.config.guided import Guided
from hybrid_opt.config.probing import EvolutionStrategy, Spsa
from hybrid_opt.estimators.align import AlignEstimator
from hybrid_opt.estimators.backprop import BackpropEstimator
from hybrid_opt.estimators.contract import Estimator
from hybrid_opt.estimators.es import EsEstimator
from hybrid_opt.estimators.forward_gradient import ForwardGradientEstimator
from hybrid_opt.estimators.fzoo import FzooEstimator
from hybrid_opt.estimators.guided.estimator import GuidedEstimator
from hybrid_opt.estimators.spsa import SpsaEstimator
from hybrid_opt.estimators.stale_gradient import StaleGradientEstimator
from hybrid_opt.estimators.wrappers.build import wrapped


def build_estimator(config: EstimatorConfig) -> Estimator:
    """The estimator that a configuration describes."""
    match config:
        case Backprop():
            return BackpropEstimator(config)
        case StaleGradient():
            estimator = StaleGradientEstimator()
        case EvolutionStrategy():
            estimator = EsEstimator(config)
        case Spsa():
            estimator = SpsaEstimator(config)
        case Align():
            estimator = AlignEstimator(config)
        case Fzoo():
            estimator = FzooEstimator(config)
        case Guided():
            estimator = GuidedEstimator(config)
        case ForwardGradient():
            estimator = ForwardGradientEstimator(config)
    return wrapped(estimator, config.wrappers)
