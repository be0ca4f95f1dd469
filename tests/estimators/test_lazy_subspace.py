"""Noise with a side that lasts: what it estimates, how well, for how long, and that its evaluation is what it adds."""

import pytest
import torch

from hybrid_opt import HybridOptimizer, UserError
from hybrid_opt.config.perturbations import LazySubspace
from hybrid_opt.config.probing import Spsa
from hybrid_opt.engines.contract import Shard
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.estimators.forward_size import ForwardSize
from hybrid_opt.estimators.low_rank import LowRankPerturbation
from hybrid_opt.estimators.noise import StepKey
from hybrid_opt.estimators.perturbation import Member
from hybrid_opt.estimators.sides import LazySides
from hybrid_opt.estimators.spsa import SpsaEstimator
from hybrid_opt.objectives.contract import FunctionObjective
from tests.conftest import losses_of_members, losses_of_written_weights, tiny_model, token_batch, token_losses
from tests.estimators.losses import LinearLoss, errors_and_cosines, near, read_all

M, N, R, CPU = 6, 8, 2, torch.device("cpu")
FORMS = [(s, b, a) for s in ("left", "right") for b in ("orthonormal", "gaussian") for a in (True, False)]


def form(side="left", basis="orthonormal", norm_alignment=True, refresh=10**6, noise_rank=R) -> LazySubspace:
    options = {"side": side, "basis": basis, "norm_alignment": norm_alignment, "refresh": refresh}
    return LazySubspace(type="lazy_subspace", noise_rank=noise_rank, **options)


def spsa(perturbation: LazySubspace, pairs: int = 1) -> SpsaEstimator:
    return SpsaEstimator(Spsa(type="spsa", learning_rate=1.0, sigma=1.0, pairs=pairs, perturbation=perturbation))


def lasting(config: LazySubspace, step: int = 0) -> torch.Tensor:
    """s U^T (r, m), or s V^T (r, n), of the matrix of `LinearLoss`."""
    key = StepKey(0, step, "estimator")
    b, a = LazySides(config).ready(key).rows([key], "layer.weight", torch.Size([M, N]), 0, M, CPU)
    return (b if config.side == "left" else a)[0]


@pytest.mark.parametrize(("side", "basis", "norm_alignment"), FORMS)
def test_the_mean_of_many_directions_is_what_lies_in_the_subspace(side, basis, norm_alignment):
    config, model = form(side, basis, norm_alignment), LinearLoss(M, N)
    lasts, g = lasting(config), model.gradient
    length = M if side == "left" else N
    if basis == "orthonormal":
        factor = length / R if norm_alignment else 1.0
        assert torch.allclose(lasts @ lasts.T, factor * torch.eye(R), atol=1e-5)
    expected = (lasts.T @ lasts @ g if side == "left" else g @ lasts.T @ lasts).flatten()
    estimates = []
    for step in range(60):
        arguments = (torch.eye(N)[None], ["layer.weight"], StepKey(0, step, "estimator"))
        engine = LocalEngine(model)
        estimate, _ = spsa(config, pairs=64).estimate(engine, FunctionObjective(model.losses), *arguments)
        estimates.append(read_all(engine, estimate))
    mean = torch.stack(estimates).mean(dim=0)
    standard_error = torch.stack(estimates).var(dim=0).sum().div(60).sqrt()
    assert standard_error < 0.12 * expected.norm()
    assert (mean - expected).norm() < 2 * standard_error


@pytest.mark.parametrize("norm_alignment", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_mean_square_error_in_one_subspace_matches_its_closed_form(side, norm_alignment):
    config, g = form(side, "orthonormal", norm_alignment), LinearLoss(M, N).gradient
    length, free = (M, R * N) if side == "left" else (N, R * M)
    s2 = length / R if norm_alignment else 1.0
    u = lasting(config) / s2**0.5
    inside = (u @ g if side == "left" else g @ u.T).pow(2).sum().item() / g.pow(2).sum().item()
    errors, _ = errors_and_cosines(spsa(config), M, N, 600)
    assert near(errors, s2 * s2 * (free + 2) * inside - 2 * s2 * inside + 1)


@pytest.mark.parametrize(
    ("basis", "expected"), [("orthonormal", M * N - 1 + 2 * M / R), ("gaussian", M * N + 1 + 2 * (M + N + 1) / R)]
)
def test_mean_square_error_over_all_subspaces_matches_its_closed_form(basis, expected):
    errors, _ = errors_and_cosines(spsa(form(basis=basis, refresh=1)), M, N, 800)
    assert near(errors, expected, resolution=0.12)


@pytest.mark.parametrize("basis", ["orthonormal", "gaussian"])
def test_a_subspace_lasts_for_refresh_steps(basis):
    sides = [lasting(form(basis=basis, refresh=5), step) for step in range(12)]
    assert all(torch.equal(sides[step], sides[5 * (step // 5)]) for step in range(12))
    assert not torch.allclose(sides[4], sides[5], atol=0.1)
    assert not torch.allclose(sides[9], sides[10], atol=0.1)


@pytest.mark.parametrize(("side", "basis", "norm_alignment"), FORMS)
def test_slices_agree_and_each_direction_is_a_sum_of_its_own(side, basis, norm_alignment):
    key, shape = StepKey(3, 7, "es"), torch.Size([7, 5])
    perturbation = LowRankPerturbation(LazySides(form(side, basis, norm_alignment)), 0.1).ready(None, [], [], key)
    keys, c = [key.fold(i) for i in range(4)], torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)

    def sum_of(keys, c, start, count):
        out = torch.zeros(count)
        perturbation.add_noise(keys, c, Shard("w", torch.zeros(count), start, shape), out)
        return out

    whole = sum_of(keys, c, 0, 35)
    one_by_one = sum(c[i] * sum_of([k], torch.ones(1), 0, 35) for i, k in enumerate(keys))
    assert torch.allclose(whole, one_by_one.float(), atol=2e-6)
    for start, count in ((0, 35), (3, 1), (4, 12), (5, 10), (34, 1)):
        assert torch.allclose(sum_of(keys, c, start, count), whole[start : start + count], atol=2e-6)
    assert torch.linalg.matrix_rank(whole.view(shape)) == R


@pytest.mark.parametrize("a_forward", [6, 2])
@pytest.mark.parametrize(("side", "basis"), [("left", "orthonormal"), ("right", "gaussian")])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_evaluated_is_what_is_added(kind, side, basis, a_forward):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny_model(kind)
    engine, key = LocalEngine(model), StepKey(1, 9, "es")
    members = [Member(key.fold(i // 2), 1 - 2 * (i % 2)) for i in range(6)]
    perturbation = LowRankPerturbation(LazySides(form(side, basis)), 0.05, forward_size=ForwardSize(members=a_forward))
    names, before = list(engine.parameters), {name: p.detach().clone() for name, p in engine.parameters.items()}
    ready = perturbation.ready(engine, names, [m.key for m in members], key)
    found = losses_of_members(engine, ready, names, members)
    assert torch.allclose(found, losses_of_written_weights(engine, ready, names, members), rtol=0, atol=2e-5)
    assert found.std(dim=0).min() > 1e-3
    assert all(torch.equal(p, before[name]) for name, p in engine.parameters.items())
    keys, again = [m.key for m in members[::2]], perturbation.ready(engine, names, [], key)
    again._drawn = type(again._drawn)()  # draws anew what `ready` has kept
    for shard in engine.shards(names):
        kept, drawn = (torch.zeros(shard.data.shape) for _ in range(2))
        ready.add_noise(keys, torch.ones(3), shard, kept)
        again.add_noise(keys, torch.ones(3), shard, drawn)
        assert torch.allclose(kept, drawn, atol=1e-6), shard.name


def document(**changes) -> dict:
    perturbation = {"type": "lazy_subspace", "noise_rank": 2, "refresh": 3, **changes}
    options = {"type": "spsa", "pairs": 3, "sigma": 1e-2, "learning_rate": 1e-2, "perturbation": perturbation}
    return {"estimators": {"spsa": options}, "schedule": {"type": "single", "estimator": "spsa"}}


def test_steps_of_one_stretch_move_a_matrix_in_its_subspace_alone_and_a_resumed_run_goes_on_in_it():
    name, batch = "model.layers.0.mlp.up_proj.weight", token_batch()
    hybrid = HybridOptimizer(tiny_model(), token_losses, schedule=document(), seed=4)
    weight = hybrid.engine.parameters[name]
    start, ranks = weight.detach().clone(), []
    for step in range(6):
        if step == 2:
            state = hybrid.state_dict()
            resumed = HybridOptimizer(tiny_model(), token_losses, schedule=document(), seed=4)
            resumed.load_state_dict(state)
        hybrid.step(batch)
        ranks.append(int(torch.linalg.matrix_rank((weight - start).double(), rtol=1e-3)))
    assert ranks == [2, 2, 2, 4, 4, 4]
    for _ in range(4):
        resumed.step(batch)
    for name, p in hybrid.engine.parameters.items():
        assert torch.equal(p, resumed.engine.parameters[name]), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_kept_memory_is_that_of_the_sides_that_last(side):
    hybrid = HybridOptimizer(tiny_model(), token_losses, schedule=document(side=side))
    for _ in range(4):  # into the second stretch
        hybrid.step(token_batch())
    shapes = {name: tuple(p.shape) for name, p in hybrid.engine.parameters.items()}
    kept = hybrid.estimators["spsa"].perturbation.sides._lasting.values()
    told = hybrid.config.estimators["spsa"].keeps(shapes)
    assert told["subspace"] == sum(side.nbytes for side in kept)
    drawn = hybrid.estimators["spsa"].perturbation._drawn._memory
    assert told["noise"] == sum(noise.nbytes for noise in drawn)


def test_more_orthonormal_vectors_than_dimensions_are_refused():
    with pytest.raises(
        UserError, match=r"noise_rank 7 is more than the 6 rows of layer.weight \(6, 8\).*write noise_rank: 6 or less"
    ):
        spsa(form(noise_rank=7)).check(LocalEngine(LinearLoss(M, N)), ["layer.weight"])
    spsa(form(noise_rank=7, side="right")).check(LocalEngine(LinearLoss(M, N)), ["layer.weight"])
    spsa(form(noise_rank=7, basis="gaussian")).check(LocalEngine(LinearLoss(M, N)), ["layer.weight"])
