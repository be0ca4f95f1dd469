"""The angle between estimates, and what antithetic losses tell, against the same numbers from whole vectors."""

import pytest
import torch

from hybrid_opt import HybridOptimizer
from hybrid_opt.engines.local import Gradients, LocalEngine
from hybrid_opt.engines.ranks import Ranks
from hybrid_opt.estimators.comparison import Compared
from hybrid_opt.estimators.es import pair_statistics
from tests.conftest import tiny_model, token_batch, token_losses


def random_gradients(engine, names, seed):
    generator = torch.Generator().manual_seed(seed)
    return Gradients({name: torch.randn(engine.parameters[name].shape, generator=generator) for name in names})


def whole(gradients, names):
    return torch.cat([gradients.by_name[name].flatten() for name in names]).double()


def test_inner_products_are_taken_where_both_move():
    engine = LocalEngine(tiny_model())
    names = list(engine.parameters)
    shared = names[:5]
    estimate, reference = random_gradients(engine, names, 1), random_gradients(engine, shared, 2)
    compared = Compared(estimate, reference, frozenset(shared))
    for shard in engine.shards(names):
        torch.testing.assert_close(compared.read(shard), estimate.read(shard), rtol=0, atol=0)
    a, b = whole(estimate, shared), whole(reference, shared)
    cosine = (a @ b / a.norm() / b.norm()).item()
    found = compared.statistics(Ranks())
    assert found["cosine"] == pytest.approx(cosine, rel=1e-5)
    assert found["rho2"] == pytest.approx(cosine**2, rel=1e-5)


def test_nothing_is_said_of_a_zero_gradient():
    engine = LocalEngine(tiny_model())
    compared = Compared(random_gradients(engine, engine.parameters, 1), Gradients({}), frozenset(engine.parameters))
    for shard in engine.shards(engine.parameters):
        compared.read(shard)
    assert compared.statistics(Ranks()) == {}


@pytest.mark.parametrize("pairs", [2, 8])
def test_a_blend_reports_the_cosine_of_its_estimates(pairs):
    """One blended SGD step moves the weights by -(g + es); a step of each alone gives the two vectors."""

    def moved(weights):
        model = tiny_model()
        start = torch.cat([p.detach().flatten().double() for p in model.parameters()])
        es = {
            "type": "es",
            "population_size": 2 * pairs,
            "sigma": 1e-3,
            "learning_rate": 1.0,
            "fitness_shaping": "none",
        }
        backprop = {"type": "backprop", "optimizer": "SGD", "learning_rate": 1.0}
        schedule = {"estimators": {"es": es, "backprop": backprop}, "schedule": {"type": "blend", "weights": weights}}
        report = HybridOptimizer(model, token_losses, schedule=schedule).step(token_batch())
        return start - torch.cat([p.detach().flatten().double() for p in model.parameters()]), report

    (g, _), (e, alone), (both, report) = moved({"backprop": 1}), moved({"es": 1}), moved({"es": 1, "backprop": 1})
    statistics = report.costs["es"].statistics
    assert statistics["cosine"] == pytest.approx((g @ e / g.norm() / e.norm()).item(), rel=1e-3)
    torch.testing.assert_close(both, g + e, rtol=1e-4, atol=1e-5)
    assert "cosine" not in alone.costs["es"].statistics
    assert report.costs["backprop"].statistics == {}


def test_statistics_of_pairs_by_hand():
    losses = torch.tensor([3.0, 1.0, 2.0, 4.0, 5.0, 5.0])  # odd parts 1, -1, 0; even parts 2, 3, 5
    found = pair_statistics(losses, sigma=0.1)
    assert found["gradient_norm"] == pytest.approx((200 / 3) ** 0.5)
    assert found["snr"] == pytest.approx((2 / 3) / (7 / 3))
    assert set(pair_statistics(losses[:4], sigma=0.1)) == {
        "gradient_norm"
    }  # a variance of two even parts tells nothing


def test_the_gradient_norm_that_probes_see_is_that_of_a_linear_loss():
    gradient = torch.randn(400, generator=torch.Generator().manual_seed(3))
    model = torch.nn.Linear(400, 1, bias=False)
    es = {"type": "es", "population_size": 4000, "sigma": 1e-2, "learning_rate": 1.0, "fitness_shaping": "none"}
    schedule = {"estimators": {"es": es}, "schedule": {"type": "single", "estimator": "es"}}
    optimizer = HybridOptimizer(model, lambda model, x: model(x).flatten(), schedule=schedule)
    report = optimizer.step(gradient.unsqueeze(0))
    # 2000 probes: the relative standard error of the norm is 1 / sqrt(2 * 2000) = .016
    assert report.costs["es"].statistics["gradient_norm"] == pytest.approx(gradient.norm().item(), rel=0.05)
