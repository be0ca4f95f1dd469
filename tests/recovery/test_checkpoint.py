"""Checkpoints: complete or not there, known to be damaged, and removed only when nobody needs them."""

import json
import re

import pytest
import torch

from hybrid_opt.engines.ranks import Ranks
from hybrid_opt.errors import UserError
from hybrid_opt.recovery.checkpoint import (
    DamagedError,
    base_of,
    checkpoints,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    verified,
)

STATE = {"a": {"w.x/y": torch.arange(3.0)}, "b": {"n": 3, "none": None, "empty": {}, "list": [1, "two"]}}


def save(folder, step, **options):
    return save_checkpoint(folder, step, Ranks(), lambda place: STATE, **options)


def names(folder) -> list[int]:
    return [int(place.name.removeprefix("step-")) for place in checkpoints(folder)]


def test_a_checkpoint_is_replaced_only_by_a_complete_one(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr("hybrid_opt.recovery.checkpoint.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save(tmp_path, 2)
    (newest,) = checkpoints(tmp_path)
    assert newest.name == "step-00000001"
    loaded = load_checkpoint(newest)
    assert torch.equal(loaded["a"]["w.x/y"], torch.arange(3.0))
    assert loaded["b"] == STATE["b"]


def test_the_latest_stay_and_what_they_are_based_on(tmp_path):
    save(tmp_path, 2, keep=2)
    save(tmp_path, 4, base=2, keep=2)
    save(tmp_path, 6, base=2, keep=2)
    assert names(tmp_path) == [6, 4, 2]
    save(tmp_path, 8, keep=2)
    assert names(tmp_path) == [8, 6, 2]
    save(tmp_path, 9, base=0, keep=2)
    assert names(tmp_path) == [9, 8]
    assert base_of(tmp_path / "step-00000009") is None
    assert base_of(tmp_path / "step-00000008") == tmp_path / "step-00000008"
    remove_checkpoints(tmp_path, light_only=True)
    assert names(tmp_path) == [8]


def test_a_whole_checkpoint_of_the_same_step_stays_and_a_damaged_one_is_replaced(tmp_path):
    place = save(tmp_path, 3)
    before = (place / "manifest.json").stat().st_mtime_ns
    save(tmp_path, 3)
    assert (place / "manifest.json").stat().st_mtime_ns == before
    (place / "rank-0/values.json").write_text("[]")
    save(tmp_path, 3)
    assert verified(place)["step"] == 3


@pytest.mark.parametrize("file", ["rank-0/tensors.safetensors", "rank-0/values.json", "manifest.json"])
def test_every_changed_byte_and_every_missing_file_is_noticed(tmp_path, file):
    place = save(tmp_path, 1)
    whole = (place / file).read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 50)):
        if file == "manifest.json" and whole[at : at + 1] in b' \n"':
            continue  # spaces say nothing
        (place / file).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DamagedError):
            verified(place)
    (place / file).unlink()
    with pytest.raises(DamagedError, match=re.escape(str(place / file))):
        verified(place)


def test_a_manifest_cannot_name_files_outside(tmp_path):
    place = save(tmp_path, 1)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"]["../../other"] = [0, ""]
    (place / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedError, match="names a file outside the checkpoint"):
        verified(place)


def test_what_is_no_safetensors_file_is_not_read(tmp_path):
    place = save(tmp_path, 1)
    (place / "rank-0/tensors.safetensors").write_bytes(b"garbage")
    with pytest.raises(UserError, match="checkpoint cannot be read"):
        load_checkpoint(place)
