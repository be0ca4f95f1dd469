"""Losses that are not finite: what estimates are made of the others, against numbers worked out by hand."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from hybrid_opt import HybridOptimizer
from hybrid_opt.config.align import Align
from hybrid_opt.config.forward_gradient import ForwardGradient
from hybrid_opt.config.fzoo import Fzoo
from hybrid_opt.config.guided import Guided
from hybrid_opt.config.probing import EvolutionStrategy, Spsa
from hybrid_opt.config.wrappers import ControlVariate
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import DivergedError
from hybrid_opt.estimators.build import build_estimator
from hybrid_opt.estimators.probing import NoiseSum
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import FunctionObjective
from hybrid_opt.perturbations.dense import DensePerturbation
from tests.estimators.losses import read_all

NAN, INF = math.nan, math.inf
DENSE = {"type": "dense", "distribution": "gaussian"}
KINDS = {"es": EvolutionStrategy, "spsa": Spsa, "align": Align, "fzoo": Fzoo, "guided": Guided}


@pytest.fixture
def estimated(monkeypatch):
    """An estimator's answer to given losses of its members, of one example or (as rows) of several, evaluation by evaluation."""

    def of(kind, *evaluations, estimator=None, step=0, examples=None, **options):
        tables = iter([torch.tensor(losses).view(len(losses), -1) for losses in evaluations])
        monkeypatch.setattr(DensePerturbation, "evaluate", lambda *arguments: next(tables))
        made = {"type": kind, "learning_rate": 1.0, "sigma": 0.5, "perturbation": DENSE, **options}
        estimator = estimator or build_estimator(KINDS[kind](**made))
        engine, batch = (
            LocalEngine(nn.Linear(5, 3)),
            torch.zeros(examples or torch.tensor(evaluations[0][0]).numel(), 5),
        )
        arguments = (FunctionObjective(lambda model, batch: None), batch, ["weight"], StepKey(0, step, kind))
        estimate, cost = estimator.estimate(engine, *arguments)
        return estimate, cost, engine, estimator

    return of


def es(**options):
    return {"population_size": 6, "fitness_shaping": "none", **options}


def test_a_pair_with_a_loss_that_is_not_finite_makes_no_slope(estimated):
    estimate, cost, *_ = estimated("es", [1.0, 3.0, NAN, 2.0, 5.0, 4.0], **es())
    assert estimate.coefficients.tolist() == pytest.approx([-2 / 3, 0, 1 / 3])  # (L+ - L-) / (N sigma)
    assert (cost.loss, cost.is_empty) == (3.0, False)  # the mean of the five that are known
    assert cost.statistics == {"nonfinite_members": 1, "gradient_norm": pytest.approx(math.sqrt(2.5))}


def test_the_others_are_shaped_as_if_they_were_all(estimated):
    losses, options = [1.0, 3.0, INF, 2.0, 5.0, 4.0], es(fitness_shaping="leave_one_out")
    estimate, *_ = estimated("es", losses, **options)
    # 4/3 (L - 3.25) of the four, times the sign
    assert estimate.coefficients.tolist() == pytest.approx([-2 * 4 / 3 / 3, 0, 4 / 3 / 3])
    alone, *_ = estimated("es", [1.0, INF, 2.0, 6.0], **{**options, "antithetic": False, "population_size": 4})
    assert alone.coefficients.tolist() == pytest.approx([-1.5, 0, -0.75, 2.25])


def test_a_member_without_a_loss_has_the_worst_rank(estimated):
    rows = [[1.0, 5.0], [NAN, 0.0], [2.0, 3.0], [4.0, 4.0]]  # means 3, 4.5 from the worst of each example, 2.5, 4
    options = es(fitness_shaping="centered_rank", antithetic=False, population_size=4)
    estimate, cost, *_ = estimated("es", rows, **options)
    assert estimate.coefficients.tolist() == pytest.approx([-1 / 6, 1 / 2, -1 / 2, 1 / 6])
    assert cost.loss == pytest.approx(9.5 / 3)
    assert cost.loss_spread == pytest.approx(torch.tensor([3.0, 2.5, 4.0]).std(correction=0).item())
    single, *_ = estimated("es", [1.0, -INF, 3.0, 2.0], **options)  # of one example it shares the rank of the worst
    assert single.coefficients.tolist() == pytest.approx([-1 / 2, 1 / 3, 1 / 3, -1 / 6])


def test_a_step_points_away_from_a_loss_that_is_not_finite_where_members_are_standardized(estimated):
    losses = [2.0, 2.0, 1.0, NAN, 2.0, 2.0]
    estimate, cost, *_ = estimated("es", losses, **es(fitness_shaping="standardize"))
    deviation = math.sqrt(5) / 6  # of 2, 2, 1, 2, 2, 2
    assert estimate.coefficients.tolist() == pytest.approx([0, -1 / deviation / 3, 0])
    assert cost.statistics["gradient_norm"] == 0.0  # which is of the pairs that are known
    # Pairs that see examples of their own are not compared with each other, so there the pair counts for nothing.
    distinct, *_ = estimated(
        "es", losses, examples=3, **es(fitness_shaping="standardize", distinct_examples=True, population_size=6)
    )
    assert distinct.coefficients.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("most", "is_empty"), [(0.0, True), (0.3, True), (0.34, False)])
def test_a_step_with_too_many_is_skipped(estimated, most, is_empty):
    estimate, cost, *_ = estimated("es", [1.0, 3.0, NAN, NAN, 5.0, 4.0], **es(max_nonfinite=most))
    assert (cost.is_empty, cost.statistics.get("skipped"), cost.nonfinite_members) == (is_empty, is_empty or None, 2)
    assert estimate.coefficients.tolist() == pytest.approx([0, 0, 0] if is_empty else [-2 / 3, 0, 1 / 3])


def test_without_any_loss_there_is_none_to_report(estimated):
    _, cost, *_ = estimated("es", [NAN] * 6, **es())
    assert (cost.loss, cost.loss_spread, cost.is_empty) == (None, None, True)
    assert cost.statistics == {"nonfinite_members": 6, "skipped": 1}


def test_one_member_is_not_compared_with_itself(estimated):
    options = es(fitness_shaping="leave_one_out", antithetic=False, population_size=2)
    estimate, cost, *_ = estimated("es", [1.0, NAN], **options)
    assert (estimate.coefficients.tolist(), cost.is_empty, cost.loss) == ([0.0, 0.0], True, 1.0)


def test_a_share_of_one_is_no_limit():
    with pytest.raises(ValidationError, match="max_nonfinite"):
        EvolutionStrategy(type="es", learning_rate=1.0, max_nonfinite=1.0)


# ------------------------------------------------------------ slopes


def test_spsa_leaves_out_what_it_does_not_know(estimated):
    estimate, cost, *_ = estimated("spsa", [1.0, 3.0, 2.0, INF, 5.0, 4.0], pairs=3)
    assert estimate.coefficients.tolist() == pytest.approx([-2 / 3, 0, 1 / 3])
    assert (cost.loss, cost.statistics["nonfinite_members"]) == (3.0, 1)
    bent, cost, *_ = estimated("spsa", [3.0], [1.0, 3.0, 2.0, INF, 5.0, 4.0], pairs=3, curvature_floor=1.0)
    # curvatures 4 (1 + 3 - 6) and 4 (5 + 4 - 6)
    assert bent.coefficients.tolist() == pytest.approx([-2 / 8 / 3, 0, 1 / 12 / 3])
    assert (cost.statistics["curvature"], cost.forwards) == (2.0, 7)


def test_a_single_pair_that_is_lost_is_a_step_that_is_skipped(estimated):
    estimate, cost, *_ = estimated("spsa", [1.0, NAN], pairs=1)
    assert (estimate.coefficients.tolist(), cost.is_empty, cost.loss) == ([0.0], True, 1.0)
    assert cost.statistics == {"nonfinite_members": 1, "skipped": 1}


def test_align_projects_onto_the_span_of_the_others(estimated):
    estimate, cost, engine, _ = estimated("align", [1.0, 3.0, 2.0, NAN, 5.0, 4.0], pairs=3)
    keys = [estimate.keys[i] for i in (0, 2)]
    z = torch.stack([read_all(engine, NoiseSum(estimate.perturbation, [k], torch.ones(1)))[:15] for k in keys]).double()
    expected = torch.linalg.solve(z @ z.T, torch.tensor([-2.0, 1.0]).double())
    assert estimate.coefficients.tolist() == pytest.approx([expected[0].item(), 0, expected[1].item()])
    assert cost.statistics["gradient_norm"] == pytest.approx(math.sqrt(2.5))


def test_fzoo_takes_spread_and_sum_over_those_that_are_known(estimated):
    estimate, cost, *_ = estimated("fzoo", [2.0, INF, 4.0, 3.0, 1.0], population_size=4)
    # rises 1, 3, 2 with the standard deviation 1
    assert estimate.coefficients.tolist() == pytest.approx([1 / 4, 0, 3 / 4, 2 / 4])
    assert (cost.loss, cost.loss_spread, cost.statistics["gradient_norm"]) == (1.0, 1.0, 2.0)


def test_fzoo_reuses_those_that_are_known(estimated):
    *_, estimator = estimated("fzoo", [1.0, 1.0, 2.0, NAN, 1.0], population_size=4, reuse=True)
    estimate, cost, *_ = estimated("fzoo", [5.0, 3.0, 6.0, 2.0], estimator=estimator, step=1)
    # one rise of the step before, 1, and three new ones: 3, 1, 4
    spread = torch.tensor([1.0, 3.0, 1.0, 4.0]).std().item()
    assert estimate.coefficients.tolist() == pytest.approx([x / 4 / spread for x in (1, 3, 1, 4)])
    assert cost.forwards == 4
    _, cost, *_ = estimated("fzoo", [NAN, NAN, 2.0], estimator=estimator, step=2)
    assert (cost.is_empty, cost.loss, len(estimator.latest.keys)) == (True, 2.0, 0)


@pytest.mark.parametrize("kind", ["fzoo", "spsa"])
def test_a_loss_at_the_weights_themselves_that_is_not_finite_ends_the_run(estimated, kind):
    evaluations = {"fzoo": [[1.0, 2.0, NAN]], "spsa": [[NAN], [1.0, 2.0]]}[kind]
    options = {"population_size": 2} if kind == "fzoo" else {"curvature_floor": 1.0}
    with pytest.raises(
        DivergedError, match="the loss at the weights as they are is not finite; lower the learning rates"
    ):
        estimated(kind, *evaluations, **options)


def test_guided_counts_an_unknown_slope_as_none_and_judges_nobody(estimated):
    losses = [1.0, 3.0, 2.0, NAN, 5.0, 4.0]
    estimate, cost, *_, estimator = estimated("guided", losses, pairs=3, guides={"type": "estimates"})
    shrinking = 3 / (3 + 15 + 1)  # no guides yet: plain, shrunk ES
    assert estimate.coefficients.tolist() == pytest.approx([-2 * shrinking / 3, 0, shrinking / 3])
    assert cost.statistics == {"nonfinite_members": 1, "fell_back": 1}
    assert len(estimator.guides) == 1
    _, cost, *_ = estimated("guided", losses, estimator=estimator, step=1)
    assert cost.statistics == {"nonfinite_members": 1, "fell_back": 0}
    assert estimator.energies == (0.0, 0.0)
    kept = estimator.guides
    _, cost, *_ = estimated("guided", [NAN] * 6, estimator=estimator, step=2)
    assert (cost.is_empty, estimator.guides is kept) == (True, True)


def test_a_tangent_without_a_finite_slope_counts_for_nothing():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    config = ForwardGradient(type="forward_gradient", learning_rate=1.0, tangents=4, distribution="rademacher")
    engine, estimator = LocalEngine(model), build_estimator(config)
    key = StepKey(0, 4, "f")
    z = torch.stack(
        [read_all(engine, NoiseSum(estimator.perturbation, [key.fold(j)], torch.ones(1))) for j in range(4)]
    )
    same = z[:, 0] == z[:, 1]
    assert same.tolist() == [False, True, False, True]

    def losses(model, batch):  # 3 w_0 + 3e38 (w_0 - w_1), whose slope overflows along z_0 = -z_1
        w = model(torch.tensor([[3.0, 0.0], [1.0, -1.0]]))
        return w[:1, 0] + w[1:, 0] * 3e38

    arguments = (engine, FunctionObjective(losses), None, ["weight"], key)
    estimate, cost = estimator.estimate(*arguments)
    assert estimate.coefficients.tolist() == pytest.approx([3 * z[j, 0].item() / 4 * same[j].item() for j in range(4)])
    assert (cost.is_empty, cost.statistics) == (False, {"nonfinite_members": 2, "gradient_norm": pytest.approx(3.0)})
    estimator = build_estimator(config.model_copy(update={"max_nonfinite": 0.4}))
    estimate, cost = estimator.estimate(*arguments)
    assert estimate.coefficients.tolist() == [0.0] * 4
    assert (cost.is_empty, cost.statistics) == (True, {"nonfinite_members": 2, "skipped": 1})


# ------------------------------------------------------------ around estimators


def test_a_control_variate_compares_only_steps_in_which_all_is_known(estimated):
    wrapper = ControlVariate(type="control_variate", refresh=50, terms=2)
    *_, around = estimated("spsa", [1.0, NAN, 1.0, 1.0], pairs=2, wrappers=[wrapper])
    assert len(around.earlier) == 0  # such a step is no anchor's first
    estimated("spsa", [2.0, 1.0, 1.0, 1.0], estimator=around, step=1)
    for step, evaluations in ((2, [[3.0, 1.0, NAN, 1.0]]), (3, [[3.0, 1.0, 1.0, 1.0], [NAN, 1.0, 1.0, 1.0]])):
        estimate, cost, *_ = estimated("spsa", *evaluations, estimator=around, step=step)
        assert estimate.coefficients.tolist() == [1.0, 0.0]  # the plain estimate
        assert (cost.forwards, len(around.earlier)) == (4 * len(evaluations), 1)


class Delicate(nn.Linear):
    """It computes with its first weights alone."""

    def __init__(self):
        super().__init__(3, 2, bias=False)
        self.start, self.is_cured = self.weight.detach().clone(), False

    def forward(self, x):
        return super().forward(x) * (1.0 if self.is_cured or torch.equal(self.weight, self.start) else NAN)


def test_a_run_of_skipped_steps_ends_with_one_message():
    model, batch = nn.Sequential(Delicate()), torch.ones(4, 3)
    spsa = {"type": "spsa", "learning_rate": 0.1, "perturbation": DENSE}
    document = {"estimators": {"a": spsa}, "schedule": {"type": "single", "estimator": "a"}}
    optimizer = HybridOptimizer(model, lambda model, batch: model(batch).sum(1), schedule=document)
    for step in range(9):
        report = optimizer.step(batch)
        assert (report.step, report.loss, optimizer.signals.lost_steps) == (step, None, step + 1)
    with pytest.raises(DivergedError) as error:
        optimizer.step(batch)
    assert str(error.value) == (
        "step 9: in 10 steps in a row more members than max_nonfinite allows had a loss that is not finite, so nothing has moved; lower "
        "sigma or the learning rates"
    )
    assert torch.equal(model[0].weight, model[0].start)
    model[0].is_cured = True
    optimizer.step(batch)
    assert optimizer.signals.lost_steps == 0
    assert not torch.equal(model[0].weight, model[0].start)
