import pytest
import torch

from hybrid_opt.engines.contract import Shard
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.estimators.dense import DensePerturbation
from hybrid_opt.estimators.noise import DISTRIBUTIONS, Key
from hybrid_opt.estimators.perturbation import Member
from hybrid_opt.objectives.contract import FunctionObjective
from tests.conftest import tiny_model, token_batch, token_losses


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_members_are_evaluated_at_the_weights_they_stand_for(distribution):
    model, sigma = tiny_model(), 0.02
    members = [Member(Key((1,)), 1), Member(Key((1,)), -1), Member(Key((2,)), 1)]
    engine = LocalEngine(model)
    with torch.no_grad():
        losses = DensePerturbation(distribution, sigma).evaluate(
            engine, FunctionObjective(token_losses), token_batch(), list(engine.parameters), members
        )
        before = {name: p.data.clone() for name, p in engine.parameters.items()}
        for member, found in zip(members, losses, strict=True):
            for name, p in engine.parameters.items():
                noise = DISTRIBUTIONS[distribution]([member.key.fold(name)], 0, p.numel(), torch.device("cpu"))
                p.data.copy_(before[name] + member.sign * sigma * noise.view_as(p))
            assert torch.allclose(found, token_losses(model, token_batch()), rtol=0, atol=1e-6)
    assert (losses[0] - losses[1]).abs().min() > 1e-4


def test_combination_is_the_weighted_sum_and_slices_are_bitwise_equal():
    perturbation = DensePerturbation("gaussian", 0.1)
    keys, c = [Key((i,)) for i in range(3)], torch.tensor([0.5, -2.0, 1.25], dtype=torch.float64)
    n = 80_000
    whole = perturbation.combine(keys, c, Shard("w", torch.zeros(n), 0, torch.Size([n])))
    noise = [DISTRIBUTIONS["gaussian"]([k.fold("w")], 0, n, torch.device("cpu"))[0].double() for k in keys]
    assert torch.allclose(whole.double(), sum(ci * e for ci, e in zip(c, noise, strict=True)), atol=1e-5)
    for start, count in ((0, 1), (32_000, 1000), (4_321, 70_000)):
        part = perturbation.combine(keys, c, Shard("w", torch.zeros(count), start, torch.Size([n])))
        assert torch.equal(part, whole[start : start + count])
