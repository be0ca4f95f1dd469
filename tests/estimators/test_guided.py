"""Guided ES against its closed forms, and what it keeps."""

import pytest
import torch

from hybrid_opt import HybridOptimizer, Trainer
from hybrid_opt.config.guided import Guided
from hybrid_opt.display.progress import Silence
from hybrid_opt.engines.local import Gradients, LocalEngine
from hybrid_opt.estimators.guided.designs import ExactDesign, MixedDesign
from hybrid_opt.estimators.guided.directions import GuidedDirections
from hybrid_opt.estimators.guided.estimator import GuidedEstimator
from hybrid_opt.estimators.guided.span import span
from hybrid_opt.estimators.guided.storage import Guide, StoredValues, sketched
from hybrid_opt.noise.keys import Key, StepKey
from hybrid_opt.objectives.contract import FunctionObjective
from tests.conftest import interrupt_after, tiny_model, token_batch, token_losses
from tests.estimators.losses import LinearLoss, errors_and_cosines, near, quadratic, read_all

M, N = 6, 8
VALUES = M * N
SGD = {"type": "backprop", "optimizer": "SGD", "optimizer_arguments": {"momentum": 0.9}, "learning_rate": 0.05}
TURNS = {"type": "alternate", "pattern": {"backprop": 1, "guided": 3}}


def config(**options) -> Guided:
    return Guided(**{"type": "guided", "learning_rate": 0.05, "sigma": 1.0, "pairs": 6, **options})


def guides_of(shares: list[float]) -> list[torch.Tensor]:
    """Directions at right angles, each with its share of the energy of LinearLoss's gradient, of lengths far from 1."""
    g = LinearLoss(M, N).gradient.flatten().double()
    q = torch.linalg.qr(torch.cat([g[:, None], torch.eye(VALUES).double()[:, :7]], dim=1))[0]
    basis, target = q[:, 1 : 1 + len(shares)], torch.tensor(shares).double().sqrt()
    # u_j = a_j ghat + sum_i C_ji v_i with u_j . u_l = delta: C C^T = 1 - a a^T
    root = torch.linalg.cholesky(torch.eye(len(shares)).double() - target[:, None] * target)
    u = target[:, None] * q[:, 0] + root @ basis.T
    return [(length * row).float() for length, row in zip((3.0, 1e-4, 70.0), u, strict=False)]


class Fresh:
    """Has seen the guides and nothing else before each estimate."""

    def __init__(self, options: dict, guides: list[torch.Tensor]):
        self.options, self.guides, self.found = options, guides, []

    def made(self, engine) -> GuidedEstimator:
        estimator = GuidedEstimator(self.options)
        for guide in reversed(self.guides):
            estimator.follow(engine, Gradients({"layer.weight": guide.view(M, N)}), ["layer.weight"])
        return estimator

    def estimate(self, engine, *arguments):
        estimate, cost = self.made(engine).estimate(engine, *arguments)
        self.found.append(cost.statistics)
        return estimate, cost


def with_guides(shares: list[float], **options) -> Fresh:
    return Fresh(config(guides={"type": "gradients", "count": max(1, len(shares))}, **options), guides_of(shares))


# ------------------------------------------------------------ closed forms


@pytest.mark.parametrize(("shares", "pairs"), [([0.5], 6), ([0.5, 0.3], 6), ([0.2], 2), ([], 6)])
def test_the_exact_forms_mean_square_error(shares, pairs):
    k, rho2 = len(shares), sum(shares)
    shrinking = (pairs - k) / (pairs - k + VALUES - k + 1)
    errors, _ = errors_and_cosines(with_guides(shares, pairs=pairs), M, N, 400)
    assert near(errors, (1 - rho2) * (1 - shrinking))


def test_the_whole_gradient_as_guide_leaves_no_error():
    errors, cosines = errors_and_cosines(Fresh(config(pairs=2), [LinearLoss(M, N).gradient * 5]), M, N, 5)
    assert errors.max() < 1e-9
    assert cosines.min() > 1 - 1e-6


@pytest.mark.parametrize(("shares", "alpha", "beta"), [([0.5], 0.5, 1.0), ([0.4, 0.1], 0.1, 2.0), ([0.0], 0.9, 0.5)])
def test_the_mixed_forms_mean_square_error(shares, alpha, beta):
    """Of `beta/(P lambda) sum (eps.g) eps`, eps ~ N(0, S): the bias `|beta/lambda S g - g|^2`, and a variance of
    `(beta/lambda)^2 (|S g|^2 + (g S g) tr S) / P`."""
    k, rho2, pairs = len(shares), sum(shares), 6
    inside = alpha + (1 - alpha) * VALUES / k
    factor = beta / inside
    bias = rho2 * (factor * inside - 1) ** 2 + (1 - rho2) * (factor * alpha - 1) ** 2
    squared, quadratic_form = (rho2 * inside**p + (1 - rho2) * alpha**p for p in (2, 1))
    expected = bias + factor**2 * (squared + quadratic_form * VALUES) / pairs
    form = {"type": "mixed_covariance", "alpha": alpha, "beta": beta}
    errors, _ = errors_and_cosines(with_guides(shares, pairs=pairs, form=form), M, N, 400)
    assert near(errors, expected)


@pytest.mark.parametrize("form", ["exact", "mixed_covariance"])
def test_energies_inside_and_outside_the_span_have_no_bias(form):
    g = LinearLoss(M, N).gradient.flatten().double()
    u = torch.stack(guides_of([0.3, 0.2])).double().T
    u = u / u.norm(dim=0)
    found = []
    for repeat in range(2000):
        z, xi = (
            torch.randn(9, VALUES + 2, generator=torch.Generator().manual_seed(repeat)).double().split([VALUES, 2], 1)
        )
        in_span = z @ u
        design = ExactDesign(in_span, VALUES, 0.5) if form == "exact" else MixedDesign(in_span, VALUES, xi, 0.97, 1.0)
        directions = design.noise[:, None] * z + design.along @ u.T
        found.append(design.energies(directions @ g))
    inside, outside = torch.tensor(found).T / g.square().sum()
    assert (inside - 0.5).abs().max() < 1e-6 if form == "exact" else near(inside, 0.5)
    assert near(outside, 0.5)


@pytest.mark.parametrize("form", ["exact", "mixed_covariance"])
def test_rho2_is_estimated(form):
    fresh = with_guides([0.5, 0.3], pairs=12, form={"type": form})
    errors_and_cosines(fresh, M, N, 200)
    rho2 = torch.tensor([found["guide_rho2"] for found in fresh.found])
    assert rho2.mean().item() == pytest.approx(0.8, abs=0.03)  # towards more, as the docstring says
    assert {found["fell_back"] for found in fresh.found} == {0}


# ------------------------------------------------------------ directions


def test_directions_of_the_exact_form_are_at_right_angles_and_slices_are_bitwise_those_of_the_whole():
    loss, keys, names = LinearLoss(M, N), [Key((0, i)) for i in range(5)], ["layer.weight"]
    engine, stored = LocalEngine(loss), guides_of([0.5, 0.3])
    guides = [
        Guide({"layer.weight": StoredValues(stored[0])}),
        Guide({"layer.weight": sketched(stored[1].view(M, N), 2)}),
    ]
    found = span(engine, names, guides, keys)
    design = ExactDesign(found.noise, VALUES, 3.0)
    factors = design.along @ found.basis.T
    directions = GuidedDirections(
        guides, dict(zip(keys, zip(design.noise.tolist(), factors.tolist(), strict=True), strict=True))
    )
    whole = directions.read(keys, "layer.weight", 0, VALUES, engine.device)
    gram = (whole.double() @ whole.double().T)[:2]
    assert torch.allclose(gram[:, :2], 9 * torch.eye(2).double(), atol=1e-3)
    assert gram[:, 2:].abs().max() < 1e-3
    for start, count in ((0, 5), (3, 9), (13, 35), (47, 1)):
        piece = directions.read(keys[1:4], "layer.weight", start, count, engine.device)
        assert torch.equal(piece, whole[1:4, start : start + count])
    assert not directions.read(keys[:1], "another", 0, 7, engine.device).any()


def test_a_probe_along_a_guide_goes_as_far_as_reach_says_and_others_at_right_angles_as_sigma():
    loss, names = LinearLoss(M, N), ["layer.weight"]
    engine, sigma = LocalEngine(loss), 1e-3
    estimator = with_guides([0.5, 0.1], sigma=sigma, form={"type": "exact", "reach": 0.2}).made(engine)
    arguments = (FunctionObjective(loss.losses), torch.eye(N)[None], names, StepKey(0, 0, "guided"))
    estimate, _ = estimator.estimate(engine, *arguments)
    moved = sigma * estimate.perturbation.directions.read(estimate.keys, *names, 0, VALUES, engine.device)
    assert moved[:2].norm(dim=1).tolist() == pytest.approx([0.2, 0.2], rel=1e-5)
    assert moved[2:].norm(dim=1).mean().item() == pytest.approx(sigma * (VALUES - 2) ** 0.5, rel=0.2)


def test_a_zero_gradient_is_no_guide():
    fresh = Fresh(config(), [torch.zeros(VALUES)])
    errors, _ = errors_and_cosines(fresh, M, N, 3)
    assert errors.isfinite().all()
    assert [found["fell_back"] for found in fresh.found] == [1, 1, 1]


# ------------------------------------------------------------ storage


@pytest.mark.parametrize(
    "storage", [{"type": t} for t in ("full", "bfloat16", "cpu")] + [{"type": "sketch", "rank": 2}]
)
@pytest.mark.parametrize("guides", [{"type": "gradients", "count": 2}, {"type": "first_moment"}, {"type": "estimates"}])
def test_the_memory_that_plan_tells_is_kept(storage, guides):
    hybrid = HybridOptimizer(tiny_model(), token_losses, schedule=document(storage=storage, guides=guides))
    for _ in range(6):
        hybrid.step(token_batch())
    kept = [
        t for g in hybrid.estimators["guided"].guides for part in g.by_name.values() for t in part.tensors().values()
    ]
    shapes = {name: tuple(p.shape) for name, p in hybrid.engine.parameters.items()}
    told = hybrid.config.estimators["guided"].keeps(shapes)
    where = "guides in main memory" if storage["type"] == "cpu" else "guides"
    assert told[where] == sum(t.nbytes for t in kept) == sum(t.untyped_storage().nbytes() for t in kept)


# ------------------------------------------------------------ with backprop


def document(**options) -> dict:
    guided = config(**{"sigma": 1e-3, "pairs": 4, **options}).model_dump(mode="json")
    return {"estimators": {"backprop": SGD, "guided": guided}, "schedule": TURNS}


def cosine(one: torch.Tensor, two: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.double(), two.double(), dim=0).item()


def test_it_looks_where_backprop_has_looked():
    """On the batch of the gradient, after a small step, nearly all of the new gradient lies along it; what is added is little."""
    hybrid = HybridOptimizer(tiny_model(), token_losses, schedule=document())
    hybrid.step(token_batch())
    before = torch.cat([p.detach().flatten() for p in hybrid.engine.model.parameters()])
    token_losses(hybrid.engine.model, token_batch()).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in hybrid.engine.model.parameters()])
    report = hybrid.step(token_batch())
    moved = torch.cat([p.detach().flatten() for p in hybrid.engine.model.parameters()]) - before
    found = report.costs["guided"].statistics
    assert (report.costs["guided"].forwards, found["fell_back"]) == (8, 0)
    assert found["guide_rho2"] > 0.5
    assert cosine(-moved, gradient) > 0.7
    assert moved.norm().item() == pytest.approx(0.05 * gradient.norm().item(), rel=0.4)


def test_the_first_moment_is_that_after_the_optimizers_step():
    hybrid = HybridOptimizer(tiny_model(), token_losses, schedule=document(guides={"type": "first_moment"}))
    for _ in range(6):
        hybrid.step(token_batch())
    (guide,) = hybrid.estimators["guided"].guides
    for name, p in hybrid.engine.parameters.items():
        kept = guide.by_name[name].values
        assert torch.equal(kept, hybrid.engine.optimizer.state[p]["momentum_buffer"].flatten())
        assert kept.data_ptr() != hybrid.engine.optimizer.state[p]["momentum_buffer"].data_ptr()


def test_before_backprop_it_is_plain_es_shrunk():
    file = document() | {"schedule": {"type": "alternate", "pattern": {"guided": 1, "backprop": 1}}}
    hybrid = HybridOptimizer(tiny_model(), token_losses, schedule=file)
    found = hybrid.step(token_batch()).costs["guided"].statistics
    assert found["fell_back"] == 1
    assert "guide_rho2" not in found


def test_guides_of_no_worth_rest_until_backprop_leaves_others():
    """A direction at right angles to the gradient: rho^2 is 0, below (6 + 1 + 1) / (6 + 48 + 1)."""
    loss, names = LinearLoss(M, N), ["layer.weight"]
    engine, objective = LocalEngine(loss), FunctionObjective(loss.losses)
    useless, batch = guides_of([0.0])[0], torch.eye(N)[None]
    estimator = Fresh(config(), [useless]).made(engine)
    told = [
        estimator.estimate(engine, objective, batch, names, StepKey(0, i, "guided"))[1].statistics for i in range(3)
    ]
    assert [found["fell_back"] for found in told] == [0, 1, 1]
    assert told[0]["guide_rho2"] < 1e-6
    estimator.follow(engine, Gradients({"layer.weight": loss.gradient}), names)
    told = [
        estimator.estimate(engine, objective, batch, names, StepKey(0, i, "guided"))[1].statistics for i in range(3, 6)
    ]
    assert [found["fell_back"] for found in told] == [0, 0, 0]
    assert told[-1]["guide_rho2"] > 1 - 1e-6


def test_its_own_estimates_gather_the_gradient():
    """Each has the last one's part of the gradient, exactly, and a little more: what it misses shrinks by 1 - c a step."""
    loss, names = LinearLoss(M, N), ["layer.weight"]
    engine, objective = LocalEngine(loss), FunctionObjective(loss.losses)
    estimator, found = GuidedEstimator(config(pairs=9, guides={"type": "estimates"})), []
    for step in range(12):
        estimate, _ = estimator.estimate(engine, objective, torch.eye(N)[None], names, StepKey(1, step, "guided"))
        found.append(cosine(read_all(engine, estimate), loss.gradient.flatten()))
    plain, guided = (VALUES + 1) / (9 + VALUES + 1), VALUES / (8 + VALUES)  # 1 - c without guides and with one
    assert found[0] ** 2 == pytest.approx(1 - plain, abs=0.1)
    assert found[-1] ** 2 == pytest.approx(1 - plain * guided**11, abs=0.06)
    assert torch.equal(estimator.guides[0].by_name["layer.weight"].values, read_all(engine, estimate))


def test_parameters_without_a_guide_get_plain_noise():
    policy = [{"match": "mlp", "use": ["backprop", "guided"]}, {"match": ".*", "use": ["guided"]}]
    hybrid = HybridOptimizer(tiny_model(), token_losses, schedule=document() | {"policy": policy})
    before = {}
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in hybrid.engine.parameters.items()}
        hybrid.step(token_batch())
    assert {name for name in before if "mlp" in name} == set(hybrid.estimators["guided"].guides[0].by_name)
    assert all(not torch.equal(before[name], p) for name, p in hybrid.engine.parameters.items())


@pytest.mark.parametrize("form", ["exact", "mixed_covariance"])
def test_weights_are_bitwise_restored(form):
    model = tiny_model().to(torch.bfloat16)
    engine, estimator = LocalEngine(model), GuidedEstimator(config(sigma=0.1, form={"type": form}))
    names = list(engine.parameters)
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    estimator.follow(engine, Gradients({n: torch.ones_like(p) for n, p in engine.parameters.items()}), names)
    estimator.estimate(engine, FunctionObjective(token_losses), token_batch(), names, StepKey(0, 0, "guided"))
    assert all(torch.equal(before[name], p) for name, p in engine.parameters.items())


def test_an_estimate_does_not_change_when_a_new_gradient_comes():
    model, objective, batch = quadratic()
    engine, estimator = LocalEngine(model), GuidedEstimator(config(sigma=0.01))
    names = list(engine.parameters)
    for factor in (1, 2):
        ones = Gradients({n: factor * torch.ones_like(p) for n, p in engine.parameters.items()})
        estimator.follow(engine, ones, names)
        if factor == 1:
            estimate, _ = estimator.estimate(engine, objective, batch, names, StepKey(0, 0, "guided"))
            before = read_all(engine, estimate)
    assert torch.equal(read_all(engine, estimate), before)


@pytest.mark.parametrize(
    "options",
    [
        {"guides": {"type": "gradients", "count": 2}, "storage": {"type": "sketch", "rank": 2}},
        {"guides": {"type": "first_moment"}, "storage": {"type": "bfloat16"}, "form": {"type": "mixed_covariance"}},
        {"guides": {"type": "estimates"}},
    ],
)
def test_a_resumed_run_goes_on_bitwise(tmp_path, options):
    def trained(folder, interrupted=None, **more):
        model = tiny_model()
        trainer = Trainer(model, token_losses, [token_batch(4), token_batch(5)], schedule=document(**options), steps=7,
                          output=tmp_path / folder, display=Silence(), **more)  # fmt: skip
        if interrupted is not None:
            interrupt_after(trainer, step=interrupted)
        trainer.train()
        return torch.cat([p.detach().flatten() for p in model.parameters()]), trainer.optimizer.estimators["guided"]

    whole, one = trained("whole")
    for step in (4, 5):  # backprop's, and the first after it
        trained(f"broken{step}", step)
        resumed, two = trained(f"broken{step}", resume=True)
        assert torch.equal(resumed, whole)
        assert (one.energies, one.are_dropped, one.due) == (two.energies, two.are_dropped, two.due)
