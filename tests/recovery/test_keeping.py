"""A run that keeps ledger and checkpoints: what is written when, and going back where something is damaged."""

import random

import numpy as np
import pytest
import torch

from hybrid_opt.config.keeping import Keeping
from hybrid_opt.display.progress import Silence
from hybrid_opt.errors import UserError
from hybrid_opt.recovery.checkpoint import base_of, checkpoints
from hybrid_opt.training.trainer import Trainer
from tests.conftest import tiny_model, token_batch, token_losses

ES = {"type": "es", "population_size": 6, "learning_rate": 1e-2, "update": {"type": "momentum"}}
ADAMW = {"type": "backprop", "learning_rate": 1e-2}
ALONE = {"estimators": {"es": ES}, "schedule": {"type": "single", "estimator": "es"}}
TURNS = {"estimators": {"es": ES, "backprop": ADAMW}, "schedule": {"type": "alternate", "pattern": {"backprop": 2, "es": 3}}}  # fmt: skip


class Lines(Silence):
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class Killed(BaseException):
    """Nobody catches it."""


def trainer_of(folder, schedule, *, losses=token_losses, steps=10, display=None, config=True, **options) -> Trainer:
    return Trainer(
        tiny_model(),
        losses,
        [token_batch()],
        schedule=schedule,
        steps=steps,
        output=folder,
        saves_model=False,
        config={"model": {"name": "tiny"}} if config else None,
        display=display or Silence(),
        **options,
    )


def run_until(trainer: Trainer, step: int) -> None:
    """Let a run end without notice before a step."""
    take_step = trainer.optimizer.step

    def step_or_die(*batches):
        if trainer.optimizer.signals.step == step:
            raise Killed
        return take_step(*batches)

    trainer.optimizer.step = step_or_die
    with pytest.raises(Killed):
        trainer.train()


def kinds(folder) -> dict[int, int | None]:
    """For each checkpoint the step of its base: its own where it has weights, None where the start's are meant."""
    return {
        int(place.name[5:]): None if (base := base_of(place)) is None else int(base.name[5:])
        for place in checkpoints(folder / "checkpoints")
    }


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.optimizer.engine.parameters.items()}


def uninterrupted(tmp_path, schedule, **options) -> dict[str, torch.Tensor]:
    trainer = trainer_of(tmp_path / "whole", schedule, **options)
    trainer.train()
    return weights(trainer)


def assert_resumes_to(expected, folder, schedule, **options) -> None:
    trainer = trainer_of(folder, schedule, resume=True, **options)
    trainer.train()
    assert all(torch.equal(weights(trainer)[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        (ALONE, {}, {6: None, 9: None}),
        (ALONE, {"keeping": Keeping(replay_at_most=0)}, {6: 6, 9: 9}),
        (ALONE, {"keeping": Keeping(replay_at_most=4)}, {6: 6, 9: 6}),
        (ALONE, {"config": False}, {3: 3, 6: 3, 9: 3}),  # nobody knows the weights at the start
        (TURNS, {}, {6: 6, 9: 9}),  # backprop in steps 0, 1, 5, 6
        (TURNS, {"keeping": Keeping(snapshots="switch")}, {7: 7, 9: 7}),
        (TURNS, {"keeping": Keeping(snapshots=1)}, {7: 7, 9: 7}),
        (TURNS, {"keeping": Keeping(snapshots=1, keep_checkpoints=4)}, {3: 2, 6: 6, 2: 2, 7: 7, 9: 7}),
    ],
)  # fmt: skip
def test_checkpoints_have_weights_only_where_the_ledger_does_not_reach(tmp_path, schedule, options, expected):
    run_until(trainer_of(tmp_path / "out", schedule, steps=12, checkpoint_every=3, **options), 10)
    assert kinds(tmp_path / "out") == expected
    whole = uninterrupted(tmp_path, schedule, steps=12, checkpoint_every=3, **options)
    assert_resumes_to(whole, tmp_path / "out", schedule, steps=12, checkpoint_every=3, **options)


def broken_run(tmp_path, schedule=ALONE, **options):
    run_until(trainer_of(tmp_path / "out", schedule, checkpoint_every=3, **options), 8)
    return tmp_path / "out", uninterrupted(tmp_path, schedule, checkpoint_every=3, **options)


@pytest.mark.parametrize("damage", ["state", "manifest", "ledger"])
def test_where_the_newest_is_damaged_the_one_before_is_used_and_said(tmp_path, damage):
    folder, expected = broken_run(tmp_path)
    if damage == "ledger":  # a byte of step 4
        lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
        lines[5] = lines[5].replace(b"e", b"f", 1)
        (folder / "ledger.jsonl").write_bytes(b"".join(lines))
    else:
        file = {"state": "rank-0/values.json", "manifest": "manifest.json"}[damage]
        (folder / "checkpoints/step-00000006" / file).write_bytes(b"[]")
    display = Lines()
    run_until(trainer_of(folder, ALONE, resume=True, checkpoint_every=3, display=display), 5)
    assert sorted(place.name for place in (folder / "checkpoints").iterdir()) == [
        "damaged-step-00000006",
        "step-00000003",
    ]
    assert_resumes_to(expected, folder, ALONE, checkpoint_every=3)
    (said,) = [line for line in display.lines if "damaged" in line]
    assert said.startswith("step-00000006 is damaged (")
    assert said.endswith("), going back to step-00000003")


def test_a_damaged_snapshot_takes_what_is_based_on_it_along(tmp_path):
    folder, expected = broken_run(tmp_path, keeping=Keeping(replay_at_most=4), steps=10)
    assert kinds(folder) == {3: None, 6: 6}
    (folder / "checkpoints/step-00000006/rank-0/tensors.safetensors").unlink()
    assert_resumes_to(expected, folder, ALONE, checkpoint_every=3)


def test_a_run_without_any_whole_checkpoint_is_not_resumed(tmp_path):
    folder, _ = broken_run(tmp_path)
    (folder / "ledger.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no checkpoint that is whole .*the record of step 0 is missing"):
        trainer_of(folder, ALONE, resume=True).train()


def test_another_model_at_the_start_is_refused(tmp_path):
    folder, _ = broken_run(tmp_path)
    other = trainer_of(folder, ALONE, resume=True)
    with torch.no_grad():
        next(iter(other.optimizer.engine.parameters.values())).add_(1)
    again = Trainer(
        other.optimizer.engine.model, token_losses, [token_batch()], schedule=ALONE, steps=10, output=folder, resume=True,
        config={"model": {"name": "tiny"}}, display=Silence(),
    )  # fmt: skip
    with pytest.raises(UserError, match="it begins with other weights than the model has now"):
        again.train()


def test_a_finished_run_leaves_snapshots_only_if_they_were_asked_for(tmp_path):
    trainer_of(tmp_path / "a", TURNS, checkpoint_every=3).train()
    assert not (tmp_path / "a/checkpoints").exists()
    trainer_of(tmp_path / "b", TURNS, checkpoint_every=3, keeping=Keeping(snapshots="switch")).train()
    assert kinds(tmp_path / "b") == {7: 7}


def noisy_losses(model, batch):
    losses = token_losses(model, batch)
    return losses * (torch.rand(len(losses)) + random.random() + np.random.rand())


def test_an_objective_that_draws_from_the_libraries_generators_goes_on_alike(tmp_path):
    def seed():
        torch.manual_seed(1)
        random.seed(2)
        np.random.seed(3)

    seed()
    expected = uninterrupted(tmp_path, TURNS, losses=noisy_losses, checkpoint_every=3)
    seed()
    run_until(trainer_of(tmp_path / "out", TURNS, losses=noisy_losses, checkpoint_every=3), 6)
    torch.rand(7), random.random(), np.random.rand(5)
    assert_resumes_to(expected, tmp_path / "out", TURNS, losses=noisy_losses, checkpoint_every=3)
