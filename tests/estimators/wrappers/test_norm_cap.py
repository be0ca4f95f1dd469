"""A capped estimate is the estimate, scaled to the cap."""

import pytest
import torch

from hybrid_opt.config.wrappers import NormCap
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.estimators.wrappers.norm_cap import NormCapEstimator
from hybrid_opt.noise.keys import StepKey
from tests.estimators.losses import quadratic, read_all
from tests.estimators.test_spsa import build


@pytest.mark.parametrize("perturbation", [{"type": "dense"}, {"type": "low_rank"}])
def test_it_scales_what_is_longer_and_leaves_what_is_not(perturbation):
    model, objective, batch = quadratic()
    engine, spsa = LocalEngine(model), build(pairs=3, sigma=0.01, perturbation=perturbation)
    arguments = (engine, objective, batch, ["weight", "bias"], StepKey(3, 1, "spsa"))
    free = read_all(engine, spsa.estimate(*arguments)[0])
    norm = free.norm().item()
    for cap, expected in ((norm / 3, free / 3), (norm * 3, free)):
        estimate, cost = NormCapEstimator(spsa, NormCap(type="norm_cap", norm=cap)).estimate(*arguments)
        assert torch.allclose(read_all(engine, estimate), expected, rtol=1e-5)
        assert cost.statistics["estimate_norm"] == pytest.approx(norm, rel=1e-5)
