"""What makes a guide, how it is sketched, and which guides are refused."""

import pytest
import torch

from hybrid_opt import HybridOptimizer
from hybrid_opt.config import load_schedule
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.guided.span import orthonormal
from hybrid_opt.estimators.guided.storage import sketched
from tests.conftest import tiny_model, token_losses
from tests.estimators.test_guided import config, document


def test_guides_that_add_nothing_are_left_out():
    g = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).double()
    rows = torch.stack(
        [g[0], torch.zeros(30), -3 * g[0] + 1e-6 * g[3], g[1] * 1e-9, g[0] + g[1], g[2] * float("inf"), g[2]]
    )
    basis = orthonormal(rows @ rows.T)
    u = rows[[0, 1, 2, 3, 4, 6]].T @ basis[[0, 1, 2, 3, 4, 6]]
    assert torch.allclose(u.T @ u, torch.eye(3).double(), atol=1e-6)
    assert not basis[[1, 2, 4, 5]].any()
    assert orthonormal(torch.zeros(2, 2).double()).shape == (2, 0)


def test_a_sketch_of_a_matrix_of_its_rank_is_exact_and_the_nearest_otherwise():
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(40, 3, generator=generator) @ torch.randn(3, 50, generator=generator)
    found = sketched(low, 3)
    assert torch.allclose(found.read(0, 2000, low.device).view(40, 50), low, atol=1e-4)
    full = torch.randn(40, 50, generator=generator)
    scales = torch.linalg.svdvals(full)
    error = (sketched(full, 5).read(0, 2000, full.device).view(40, 50) - full).norm()
    assert scales[5:].norm() <= error < 1.05 * scales[5:].norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturbation": {"type": "low_rank"}}, "low rank noise cannot follow; write perturbation: {type: dense}"),
        ({"perturbation": {"type": "dense", "distribution": "rademacher"}}, "write distribution: gaussian"),
        ({"pairs": 3, "guides": {"type": "gradients", "count": 3}}, "pairs: 3 leaves no pair .* write 4 or more"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_guides_need_backprop():
    alone = {"type": "single", "estimator": "guided"}
    with pytest.raises(UserError, match="'guided': guided uses gradients of a backprop estimator again, but none acts"):
        load_schedule(document() | {"schedule": alone})
    load_schedule(document(guides={"type": "estimates"}) | {"schedule": alone})
    file = document(guides={"type": "first_moment"})
    file["estimators"]["backprop"] = {"type": "backprop", "optimizer": "SGD", "learning_rate": 0.1}
    with pytest.raises(UserError, match=r"guided.guides: SGD keeps no first moment; write guides: \{type: gradients\}"):
        load_schedule(file)
    policy = [{"match": "mlp", "use": ["backprop"]}, {"match": ".*", "use": ["guided"]}]
    with pytest.raises(UserError, match="no rule lets both move the same parameter"):
        HybridOptimizer(tiny_model(), token_losses, schedule=document() | {"policy": policy})
