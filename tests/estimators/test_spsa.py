"""SPSA against its closed forms, MeZO's loop written out, and `es` without shaping."""

import pytest
import torch

from hybrid_opt import HybridOptimizer
from hybrid_opt.config.probing import EvolutionStrategy, Spsa
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.estimators.es import EsEstimator
from hybrid_opt.estimators.spsa import SpsaEstimator
from hybrid_opt.noise.drawing import gaussian
from hybrid_opt.noise.keys import StepKey
from tests.conftest import tiny_model, token_batch, token_losses
from tests.estimators.losses import errors_and_cosines, near, quadratic, read_all

GAUSSIAN, RADEMACHER = ({"type": "dense", "distribution": d} for d in ("gaussian", "rademacher"))


def build(**options) -> SpsaEstimator:
    return SpsaEstimator(
        Spsa(**{"type": "spsa", "learning_rate": 1.0, "sigma": 1.0, "perturbation": GAUSSIAN, **options})
    )


@pytest.mark.parametrize(
    ("perturbation", "q", "expected"), [(GAUSSIAN, 1, 49), (GAUSSIAN, 4, 49 / 4), (RADEMACHER, 4, 47 / 4)]
)
def test_mean_square_error_matches_its_closed_form(perturbation, q, expected):
    errors, _ = errors_and_cosines(build(pairs=q, perturbation=perturbation), 6, 8, 400)
    assert near(errors, expected)


@pytest.mark.parametrize("perturbation", [GAUSSIAN, {"type": "low_rank", "noise_rank": 2}])
def test_q_pairs_are_es_without_shaping(perturbation):
    model, objective, batch = quadratic()
    engine, arguments = LocalEngine(model), (["weight", "bias"], StepKey(3, 1, "spsa"))
    options = {"learning_rate": 1.0, "sigma": 0.01, "perturbation": perturbation}
    es = EsEstimator(EvolutionStrategy(type="es", population_size=6, fitness_shaping="none", **options))
    ours, cost = build(pairs=3, **options).estimate(engine, objective, batch, *arguments)
    others, es_cost = es.estimate(engine, objective, batch, *arguments)
    assert torch.allclose(read_all(engine, ours), read_all(engine, others), rtol=1e-6, atol=0)
    assert cost.statistics["gradient_norm"] == pytest.approx(es_cost.statistics["gradient_norm"])
    assert (cost.forwards, cost.backwards, cost.loss) == (6, 0, es_cost.loss)


def test_the_recipe_is_mezo():
    """Three steps of `schedules/mezo.yaml` and of MeZO's loop, written out, along the same directions."""
    model, batch, epsilon, rate = tiny_model(), token_batch(), 1e-3, 1e-6
    ours = HybridOptimizer(tiny_model(), token_losses, schedule="mezo", seed=5)
    parameters = dict(model.named_parameters())
    for step in range(3):
        ours.step(batch)
        key = StepKey(5, step, "spsa").fold(0)
        z = {n: gaussian([key.fold(n)], 0, p.numel(), p.device)[0].view_as(p) for n, p in parameters.items()}
        start = {n: p.detach().clone() for n, p in parameters.items()}
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                for n, p in parameters.items():
                    p.copy_(z[n] * (sign * epsilon) + start[n])
                losses.append(token_losses(model, batch).mean().item())
            projected = (losses[0] - losses[1]) / (2 * epsilon)
            for n, p in parameters.items():
                p.copy_(start[n] - rate * projected * z[n])
    moved = dict(ours.engine.model.named_parameters())
    for n, p in parameters.items():
        assert torch.allclose(moved[n], p, rtol=0, atol=1e-9 + 2**-23 * p.abs().max().item()), n
        assert not torch.equal(moved[n], dict(tiny_model().named_parameters())[n])
