"""Checkpoints and metrics with files cut off, bits turned over, or other content: a clear error or what was saved, never anything else."""

import json
import random
import shutil

import pytest
import torch

from hybrid_opt.engines.ranks import Ranks
from hybrid_opt.errors import UserError
from hybrid_opt.recovery.checkpoint import load_checkpoint, save_checkpoint, verified
from hybrid_opt.run_files.run_folder import RunFolder
from tests.damage import damaged

STATE = {
    "optimizer": {
        "engine": {"weights": {"model.norm.weight": torch.arange(8.0), "half": torch.ones(3, dtype=torch.bfloat16)}},
        "signals": {"step": 3, "loss": 0.25, "tokens": 96},
        "rules": {"es": {"velocity": {"model.norm.weight": torch.zeros(8)}}},
        "layout": {"ranks": 1, "zero_stage": 0},
        "empty": {},
    },
    "attribution": {"decrease": {"es": 0.5}, "last": None},
    "before": {"loss": 2.5},
}
DAMAGES = 150
"""Of each file of a checkpoint."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return save_checkpoint(folder, 3, Ranks(), lambda place: STATE)


def outcomes(whole, folder):
    """For many damages of each file: the damage, and what was loaded or why not."""
    for file in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        luck = random.Random(str(file))
        for number in range(DAMAGES):
            copy = shutil.copytree(whole, folder / f"{file.name}-{number}" / whole.name)
            (copy / file).write_bytes(damaged((whole / file).read_bytes(), luck))
            try:
                verified(copy)
                yield f"{file}, damage {number}", load_checkpoint(copy)
            except UserError as error:
                yield f"{file}, damage {number}", str(error)
            shutil.rmtree(copy.parent)


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return (
            isinstance(one, torch.Tensor)
            and isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and torch.equal(one, other)
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def test_an_undamaged_one_is_what_was_saved(whole):
    assert same(load_checkpoint(whole), STATE)


def test_damage_is_an_error_or_harmless(whole, tmp_path):
    found = list(outcomes(whole, tmp_path))
    errors = [outcome for _, outcome in found if isinstance(outcome, str)]
    assert all(error.startswith(f"{tmp_path}/") for error in errors)
    assert len(found) >= 3 * DAMAGES
    assert len(errors) >= 0.9 * len(found)
    loaded = {what: state for what, state in found if not isinstance(state, str)}
    assert [what for what, state in loaded.items() if not same(state, STATE)] == []


@pytest.mark.parametrize("name", ["tensors.safetensors", "values.json"])
def test_a_damaged_file_without_its_manifest_is_never_another_error(whole, tmp_path, name):
    """What `verified` lets through by chance, or a hand has changed together with the manifest."""
    copy, luck, errors = shutil.copytree(whole, tmp_path / whole.name), random.Random(name), []
    file = next(copy.rglob(name))
    content = file.read_bytes()
    for _ in range(DAMAGES):
        file.write_bytes(damaged(content, luck))
        try:
            load_checkpoint(copy)
        except UserError as error:
            errors.append(str(error))
    assert len(errors) >= DAMAGES / 3
    assert all(error.startswith(f"{tmp_path}/") and "cannot be read" in error for error in errors)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"9" * 5000, b"[[3, 4]]", b"[[[], 4]]", b"{}x", b"[[[\"optimizer\", \"engine\"], 1], [[\"optimizer\", \"engine\", \"a\"], 1]]", b"\xff"]
)  # fmt: skip
def test_values_that_are_no_state_are_named(whole, tmp_path, content):
    copy = shutil.copytree(whole, tmp_path / whole.name)
    next(copy.rglob("values.json")).write_bytes(content)
    with pytest.raises(UserError, match=r"step-00000003.*cannot be read"):
        load_checkpoint(copy)


@pytest.mark.parametrize("name", ["tensors.safetensors", "values.json"])
def test_a_missing_file_is_named(whole, tmp_path, name):
    copy = shutil.copytree(whole, tmp_path / whole.name)
    next(copy.rglob(name)).unlink()
    with pytest.raises(UserError, match=r"step-00000003.*cannot be read"):
        load_checkpoint(copy)


# ---------------------------------------------------------------- what is read beside it when a run goes on


ROWS = [
    {"step": step, "loss": 2.0 / (step + 1), "estimators": ["es"], "parts": {"es": {"seconds": 0.5}}}
    for step in range(6)
]


@pytest.fixture
def run_folder(tmp_path):
    folder = RunFolder(tmp_path)
    for row in ROWS:
        folder.append(folder.metrics, row)
    return folder


def test_a_half_written_last_line_is_taken_again(run_folder):
    content = run_folder.metrics.read_bytes()
    run_folder.metrics.write_bytes(content[:-9])
    run_folder.drop_after(5)
    assert list(run_folder.recorded()[0]) == ROWS[:5]


def test_damaged_metrics_are_rows_or_an_error(run_folder):
    content, luck, errors = run_folder.metrics.read_bytes(), random.Random(0), []
    for _ in range(200):
        run_folder.metrics.write_bytes(damaged(content, luck))
        try:
            run_folder.drop_after(5)
            assert all(isinstance(row["step"], int) for row in list(run_folder.recorded()[0]))
        except UserError as error:
            errors.append(str(error))
    assert len(errors) >= 50
    assert all(error.startswith(f"{run_folder.metrics}: ") for error in errors)


def test_a_damaged_run_file_is_named(run_folder):
    run_folder.config.write_bytes(b"model: {name: [\n")
    with pytest.raises(UserError, match=r"run\.yaml: line 2, column 1: "):
        run_folder.read_config()


def test_numbers_and_brackets_without_end_are_named(run_folder):
    for line, named in (
        ("[" * 100_000, "line 1: "),
        ("9" * 5000, "line 1: "),
        (json.dumps({"stap": 3}), "a line has no step: "),
    ):
        run_folder.metrics.write_text(f"{line}\n" + json.dumps(ROWS[1]) + "\n")
        with pytest.raises(UserError, match=rf"metrics\.jsonl: {named}"):
            run_folder.drop_after(5)
