"""Runs that diverge, on a loss whose every weight can be worked out by hand: `w^2 / 2`, where a step of rate r makes `(1 - r) w` of w."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from hybrid_opt import Trainer, UserError, load_run
from hybrid_opt.config.divergence import Divergence
from hybrid_opt.config.training import Training
from hybrid_opt.display.progress import Silence
from hybrid_opt.errors import DivergedError
from hybrid_opt.reports.writing import read_report
from hybrid_opt.run_files.run_folder import RunFolder
from hybrid_opt.training.divergence import Watch
from tests.conftest import PROSE, die_before, interrupt_after

INF, NAN = math.inf, math.nan
BACK = {"action": "roll_back"}


# ------------------------------------------------------------ what a sequence of losses says


def says(losses, **config):
    """After each evaluation whether it is the best, and whether the run diverges."""
    watch = Watch(Divergence(**config))
    return [(is_best, bool(reason)) for is_best, reason in map(watch.sees_evaluation, losses)]


def metrics_of(run: Trainer) -> list[dict]:
    return list(run.folder.recorded()[0])


def evaluations_of(run: Trainer) -> list[dict]:
    return list(run.folder.recorded()[1])


YES, NO, END = (True, False), (False, False), (False, True)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([5, 4, 3, 2], [YES] * 4),
        ([5, 6, 7], [YES, NO, END]),
        ([5, 6, 5.5], [YES, NO, END]),  # above the best, though it falls
        ([5, 6, 5, 6, 7], [YES, NO, NO, NO, END]),  # as good as the best is not above it, nor better
        ([5, 6, 4, 4.5, 4.2], [YES, NO, YES, NO, END]),
        ([-1, -2, -1.5, -1.9], [YES, YES, NO, END]),  # rewards are negative losses
        ([5, NAN], [YES, END]),
        ([5, -INF], [YES, END]),
        ([5, 10, 10.5], [YES, NO, END]),
        ([10.5], [END]),
    ],
)
def test_evaluations(losses, expected):
    assert says(losses, rises_for=2, loss_above=10) == expected


def test_steps_only_know_a_limit():
    watch = Watch(Divergence(loss_above=2.5))
    found = [watch.sees_step(loss) for loss in (None, 2.5, -7.0, 2.51)]
    assert found == ["", "", "", "the training loss, 2.51, is above 2.5 (training.divergence.loss_above)"]


def test_roll_backs_are_counted_and_start_the_count_of_rises_anew():
    watch = Watch(Divergence(rises_for=2, most=2, **BACK))
    for loss in (1.0, 2.0, 2.0):
        _, reason = watch.sees_evaluation(loss)
    assert reason == (
        "the validation loss, 2, has been above its best, 1, in 2 evaluations in a row (training.divergence.rises_for)"
    )
    assert [watch.goes_back(), watch.worse, watch.best] == [True, 0, 1.0]
    assert watch.sees_evaluation(1.5) == NO_REASON
    assert [watch.goes_back(), watch.goes_back()] == [True, False]
    assert not Watch(Divergence(loss_above=1)).goes_back()


NO_REASON = (False, "")


@pytest.mark.parametrize(
    ("divergence", "message"),
    [
        ({}, "says neither when a run diverges nor to go back"),
        ({"rises_for": 0, **BACK}, "greater than or equal to 1"),
        ({"loss_above": 1, "factor": 1}, "less than 1"),
        ({"rises_for": 2}, "write evaluate_every, or loss_above alone"),
        (BACK, "write evaluate_every, or loss_above alone"),
    ],
)
def test_what_a_run_file_may_not_say(divergence, message):
    with pytest.raises(ValidationError, match=message):
        Training(steps=3, divergence=divergence)


def test_a_run_file_without_held_out_rows_cannot_go_back(write_run):
    data = {"train": str(PROSE), "text": "text"}
    training = {"steps": 3, "evaluate_every": 1, "divergence": {"loss_above": 9}}
    path = write_run(data=data, objective={"type": "causal_lm"}, training=training)
    assert load_run(path).training.divergence == Divergence(loss_above=9)
    with pytest.raises(
        UserError,
        match=r"training.divergence: rises_for and roll_back go by the loss on held-out rows; write data.validation",
    ):
        load_run(path, ["training.divergence.rises_for=2"])


def test_the_best_weights_need_rows_and_a_folder(tmp_path):
    back = Divergence(**BACK)
    with pytest.raises(UserError, match=r"pass validation=... and evaluate_every=..."):
        trainer(back, output=tmp_path, validation=())
    with pytest.raises(UserError, match=r"keeps the best weights in the output folder; pass output=..."):
        trainer(back)


# ------------------------------------------------------------ what becomes of a run


class Weight(nn.Module):
    """One weight, 1 at the start."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))


BATCH = torch.zeros(2, 1)
TURNS = {"type": "alternate", "pattern": {"backprop": 2, "es": 1}}


def half_square(model, batch):
    return model.w.square() / 2 + batch[:, 0]


def trainer(divergence, *, losses=half_square, rate=3.0, steps=6, schedule=None, **options):
    backprop = {"type": "backprop", "optimizer": "SGD", "learning_rate": rate}
    document = {"estimators": {"backprop": backprop}, "schedule": {"type": "single", "estimator": "backprop"}}
    settings = {"validation": [BATCH], "evaluate_every": 1, "saves_model": False, "display": Lines(), **options}
    return Trainer(
        Weight(), losses, [BATCH], schedule=schedule or document, steps=steps, divergence=divergence, **settings
    )


class Lines(Silence):
    """Keeps what is said."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def weight(run) -> float:
    return run.optimizer.engine.model.w.item()


def test_rising_evaluations_roll_back_and_lower_the_rate(tmp_path):
    # w is 1, -2, 4 at rate 3; back at 1 with rate 1.5 it is -1/2, 1/4, -1/8, 1/16.
    run = trainer(Divergence(rises_for=2, **BACK), output=tmp_path / "out", probe=[BATCH])
    summary = run.train()
    assert weight(run) == 0.0625
    assert [row["loss"] for row in evaluations_of(run)] == [0.5, 2, 8, 0.125, 1 / 32, 1 / 128, 1 / 512]
    assert [(row["step"], row["loss"]) for row in metrics_of(run)[:4]] == [(0, 0.5), (1, 2), (2, 0.5), (3, 0.125)]
    assert [row["learning_rates"]["backprop"] for row in metrics_of(run)] == [3, 3, 1.5, 1.5, 1.5, 1.5]
    reason = "step 2: the validation loss, 8, has been above its best, 0.5, in 2 evaluations in a row (training.divergence.rises_for)"
    told = {"to": 0, "because": f"{reason}; lower the learning rates", "rate_factor": 0.5}
    assert [row.get("rolled_back") for row in metrics_of(run)] == [None, None, told, None, None, None]
    assert run.display.said[-2] == (
        "rolled back to the weights after step 0, learning rates times 0.5 from now on (roll back 1 of 3), because at "
        f"{reason}; lower the learning rates"
    )
    # Credits add up to the fall of the loss, which went nowhere in the steps that were undone.
    assert summary.estimators["backprop"].loss_decrease == pytest.approx(0.5 - 1 / 512)
    assert summary.roll_backs == 1
    assert ("roll backs", "1") in read_report(tmp_path / "out").facts
    assert not RunFolder(tmp_path / "out").checkpoints.exists()


def test_a_training_loss_above_the_limit_rolls_back_to_the_best_evaluation(tmp_path):
    # At rate 1.5 w is 1, -1/2, 1/4, where it is evaluated; then at 6 -5/4, 25/4.
    run = trainer(Divergence(loss_above=0.6, factor=0.25, **BACK), output=tmp_path, evaluate_every=2)
    run.optimizer.updates.learning_rates["backprop"] = lambda step: 1.5 if step < 2 else 6.0
    run.train()
    assert [row["loss"] for row in metrics_of(run)] == [0.5, 0.125, 1 / 32, 0.78125, 1 / 32, 1 / 128]  # at 6/4 again
    assert [row.get("rolled_back", {}).get("to") for row in metrics_of(run)] == [None, None, None, None, 2, None]
    assert [(row["step"], row["loss"]) for row in evaluations_of(run)] == [
        (0, 0.5),
        (2, 1 / 32),
        (4, 1 / 32),
        (6, 1 / 512),
    ]
    assert weight(run) == 0.0625


def test_a_step_that_cannot_be_taken_is_passed_over(tmp_path):
    def losses(model, batch):
        return half_square(model, batch) * (NAN if model.w.abs() > 3 else 1)

    run = trainer(Divergence(**BACK), losses=losses, output=tmp_path, evaluate_every=10)
    run.train()
    # 1, -2, 4; step 2 finds no loss; from 1 again: -1/2, 1/4, -1/8
    assert [row["step"] for row in metrics_of(run)] == [0, 1, 3, 4, 5]
    assert weight(run) == -0.125
    assert metrics_of(run)[2]["rolled_back"]["because"] == (
        "step 2, estimator backprop: the loss is nan; lower the learning rates, or clip gradients with gradient_clipping"
    )


def test_a_weight_that_is_lost_is_put_back(tmp_path):
    def losses(model, batch):
        return 100 * half_square(model, batch)

    run = trainer(Divergence(factor=1e-37, **BACK), losses=losses, rate=1e37, steps=2, output=tmp_path)
    run.train()
    assert metrics_of(run)[0]["step"] == 1  # in step 0 the weight became infinite
    assert metrics_of(run)[0]["rolled_back"]["because"] == (
        "step 0: after the update parameter w has values that are not finite; lower the learning rates, or clip gradients with "
        "gradient_clipping"
    )
    assert weight(run) == pytest.approx(-99)


def test_the_next_divergence_after_the_last_roll_back_ends_the_run(tmp_path):
    run = trainer(Divergence(rises_for=1, factor=0.9, most=2, **BACK), output=tmp_path, steps=20)
    with pytest.raises(
        DivergedError,
        match=r"^step 3: the validation loss, 1.022, has been above its best, 0.5, .*\(after 2 roll backs\) \(saved in",
    ):
        run.train()
    assert [row["step"] for row in metrics_of(run) if "rolled_back" in row] == [1, 2]
    assert weight(run) == pytest.approx(1 - 3 * 0.81)


def test_stop_ends_the_run(tmp_path):
    run = trainer(Divergence(loss_above=5), output=tmp_path)
    with pytest.raises(
        DivergedError,
        match=r"^step 2: the validation loss, 8, is above 5 \(training.divergence.loss_above\); lower the learning",
    ):
        run.train()
    assert not (tmp_path / "checkpoints/best").exists()


def test_a_limit_below_the_first_loss_is_refused(tmp_path):
    run = trainer(Divergence(loss_above=0.4, **BACK), output=tmp_path)
    with pytest.raises(
        UserError, match=r"before the first step the validation loss, 0.5, is above 0.4 .*; raise the limit"
    ):
        run.train()


def test_evaluations_are_compared_on_the_same_rows(tmp_path):
    run = trainer(Divergence(rises_for=1, **BACK), output=tmp_path, rate=0.5, validation_along=[BATCH + 7])
    run.train()
    assert [row["loss"] for row in evaluations_of(run)[:2]] == [0.5, 7.125]  # which is less than 7.5 was before
    assert not any("rolled_back" in row for row in metrics_of(run))


ES = {
    "type": "es", "population_size": 6, "sigma": 0.1, "fitness_shaping": "none", "learning_rate": 0.4, "update": {"type": "momentum"},
    "perturbation": {"type": "dense"},
}  # fmt: skip
MOMENTUM = {"type": "backprop", "optimizer": "SGD", "optimizer_arguments": {"momentum": 0.9}, "learning_rate": 0.9}


def resumable(folder, **options):
    schedule = {"estimators": {"es": ES, "backprop": MOMENTUM}, "schedule": TURNS}
    divergence = Divergence(rises_for=2, factor=0.7, most=9, **BACK)
    return trainer(divergence, schedule=schedule, steps=12, output=folder, seed=3, **options)


def stopped(run):
    interrupt_after(run, 5)
    assert not run.train().finished


@pytest.mark.parametrize("end", [stopped, lambda run: die_before(run, 5), lambda run: die_before(run, 8)])
def test_a_resumed_run_has_the_same_roll_backs(tmp_path, end):
    whole = resumable(tmp_path / "whole")
    whole.train()
    end(resumable(tmp_path / "parts", checkpoint_every=1))
    resumed = resumable(tmp_path / "parts", resume=True)
    resumed.train()
    assert weight(resumed) == weight(whole)
    kept = ("step", "loss", "learning_rates", "rolled_back")
    rows, again = ([{name: row.get(name) for name in kept} for row in metrics_of(run)] for run in (whole, resumed))
    assert rows == again
    assert [row["loss"] for row in evaluations_of(whole)] == [row["loss"] for row in evaluations_of(resumed)]
    assert [row["step"] for row in rows if row["rolled_back"]] == [
        3,
        5,
        8,
        11,
    ]  # at 8 from a checkpoint that knows of it
