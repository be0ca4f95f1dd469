"""Full disks, quotas and killed processes: files are whole or as they were, and one error says what to do."""

import errno
import json
import os
import threading
from contextlib import ExitStack, contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_opt.display.progress import Silence
from hybrid_opt.errors import UserError
from hybrid_opt.run_files import durable
from hybrid_opt.run_files.durable import CannotWriteError, append_line, write_atomically, writing, written_aside
from hybrid_opt.run_files.json_lines import JsonLines
from tests.training.test_long_runs import small_trainer

resource = pytest.importorskip("resource", reason="Windows has no limits for processes")
TOO_LARGE = r"cannot be written: File too large; raise the limit on the size of files \(ulimit -f\)"


@contextmanager
def largest_file(size: int):
    """Inside, the operating system refuses to let a file grow beyond so many bytes, after it has taken what fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refuse(number: int):
    def refused(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return refused


def names(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# ---------------------------------------------------------------- files


def test_a_file_that_cannot_be_replaced_is_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    with largest_file(100), pytest.raises(CannotWriteError, match=TOO_LARGE):
        write_atomically(path, b"x" * 101)
    assert (path.read_text(), names(tmp_path)) == ("old", ["summary.json"])
    monkeypatch.setattr(durable.os, "replace", refuse(errno.EROFS))
    with pytest.raises(
        CannotWriteError, match=r"summary.json: cannot be written: Read-only file system; make that file"
    ):
        write_atomically(path, "new")
    assert (path.read_text(), names(tmp_path)) == ("old", ["summary.json"])
    monkeypatch.undo()
    write_atomically(path, "new")
    assert (path.read_text(), names(tmp_path)) == ("new", ["summary.json"])


def _interrupted_in(folder):
    with written_aside(folder) as place:
        place.mkdir()
        raise KeyboardInterrupt


def test_a_folder_takes_the_place_of_another_only_when_it_is_whole(tmp_path):
    with written_aside(tmp_path / "model") as place:
        place.mkdir()
        (place / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        _interrupted_in(tmp_path / "model")
    assert (names(tmp_path), names(tmp_path / "model")) == (["model"], ["a"])
    with written_aside(tmp_path / "model") as place:
        place.mkdir()
        (place / "b").write_text("new")
    assert (names(tmp_path), names(tmp_path / "model")) == (["model"], ["b"])


def test_a_line_that_does_not_fit_is_taken_back(tmp_path):
    path = tmp_path / "lines"
    append_line(path, "x" * 89)
    with largest_file(100), pytest.raises(CannotWriteError, match=TOO_LARGE):
        append_line(path, "y" * 50)
    assert path.read_text() == "x" * 89 + "\n"


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_the_errors_of_libraries_that_write_are_understood(tmp_path, save):
    with (
        largest_file(1000),
        pytest.raises(CannotWriteError, match=r"model: cannot be written: .*(ulimit|full)") as caught,
    ):
        with writing(tmp_path / "model"):
            save({"w": torch.zeros(1000)}, tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_other_mistakes_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), writing(tmp_path):
        raise RuntimeError("wrong shape")


# ---------------------------------------------------------------- JSON lines


def test_what_a_kill_leaves_of_a_line_is_left_out_and_cut_off(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.keep(lambda row: True)
    assert list(lines) == []
    for step in range(4):
        lines.append({"step": step})
    whole = lines.path.read_bytes()
    for rest in (b'{"step": 4, "lo', b'{"step": 4, "lo\n', b"\0\0\0", b"\n"):
        lines.path.write_bytes(whole + rest)
        assert [row["step"] for row in lines] == [0, 1, 2, 3]
        assert lines.cut == (rest != b"\n")
        lines.keep(lambda row: True)
        assert lines.path.read_bytes() == whole
    lines.path.write_bytes(whole[:-1])
    lines.keep(lambda row: True)
    assert (lines.path.read_bytes(), lines.cut) == (whole, False)
    lines.keep(lambda row: row["step"] < 2)
    assert lines.path.read_bytes() == b'{"step": 0}\n{"step": 1}\n'


def test_damage_before_the_end_is_named(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2: not JSON \(.*\); mend or delete the line"):
        list(lines)


def test_a_reader_sees_whole_rows_while_they_are_written(tmp_path):
    lines, filling = JsonLines(tmp_path / "metrics.jsonl"), "x" * 10_000
    writer = threading.Thread(target=lambda: [lines.append({"step": i, "filling": filling}) for i in range(300)])
    writer.start()
    reader, seen = JsonLines(lines.path), 0
    while seen < 300:
        rows = list(reader)
        assert [row["step"] for row in rows] == list(range(len(rows)))
        assert len(rows) >= seen
        seen = len(rows)
    writer.join()


# ---------------------------------------------------------------- runs


@pytest.fixture
def limits():
    with ExitStack() as stack:
        yield stack


def limit_after(trainer, step: int, limits) -> None:
    """Let no file grow beyond 20 kB once the trainer has taken a step."""
    take_step = trainer.optimizer.step

    def step_and_limit(*batches):
        report = take_step(*batches)
        if report.step == step:
            limits.enter_context(largest_file(20_000))
        return report

    trainer.optimizer.step = step_and_limit


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_and_the_run_goes_on_from_it(tmp_path, limits):
    wide = {"width": 512, "checkpoint_every": 2, "display": Silence()}
    trainer = small_trainer(tmp_path / "out", 8, **wide)
    limit_after(trainer, 2, limits)
    with pytest.raises(CannotWriteError) as caught:
        trainer.train()
    limits.close()
    assert str(caught.value) == (
        f"{tmp_path}/out/checkpoints: cannot be written: File too large; raise the limit on the size of files (ulimit -f); the "
        "checkpoint after step 2 is whole: go on from it with the same command and --resume"
    )
    assert names(tmp_path / "out/checkpoints") == ["step-00000002"]
    assert small_trainer(tmp_path / "out", 8, resume=True, **wide).train().finished
    small_trainer(tmp_path / "whole", 8, **wide).train()
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [row["step"] for row in JsonLines(tmp_path / "out/metrics.jsonl")] == list(range(8))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_metrics_that_cannot_be_written_end_the_run_with_a_checkpoint_of_now_if_that_can_be(
    tmp_path, monkeypatch, number
):
    trainer = small_trainer(tmp_path / "out", 8, display=Silence())
    take_step = trainer.optimizer.step

    def step(*batches):
        if trainer.optimizer.signals.step == 3:
            monkeypatch.setattr(durable.os, "write", refuse(number))
        return take_step(*batches)

    trainer.optimizer.step = step
    with pytest.raises(CannotWriteError) as caught:
        trainer.train()
    assert str(caught.value) == (
        f"{tmp_path}/out/metrics.jsonl: cannot be written: {os.strerror(number)}; {durable.MEND[number]}; the checkpoint after step 4 "
        "is whole: go on from it with the same command and --resume"
    )
    assert [row["step"] for row in JsonLines(tmp_path / "out/metrics.jsonl")] == [0, 1, 2]


def test_a_model_that_does_not_fit_leaves_no_half_of_it(tmp_path, limits):
    trainer = small_trainer(tmp_path / "out", 3, width=512, display=Silence())
    limit_after(trainer, 2, limits)
    with pytest.raises(CannotWriteError) as caught:
        trainer.train()
    limits.close()
    assert str(caught.value).startswith(f"{tmp_path}/out/model: cannot be written: File too large; ")
    assert str(caught.value).endswith("; no checkpoint had been saved, so start anew with --overwrite")
    assert names(tmp_path / "out") == [
        "checkpoints",
        "evaluations.jsonl",
        "ledger.jsonl",
        "machine.json",
        "messages.log",
        "metrics.jsonl",
        "process.json",
    ]
    assert names(tmp_path / "out/checkpoints") == []


def test_what_a_killed_process_was_writing_is_removed_by_the_next_one(tmp_path):
    out = tmp_path / "out"
    small_trainer(out, 1, display=Silence()).train()
    (out / ".writing-model").mkdir()
    (out / ".writing-summary.json").write_text("{")
    small_trainer(out, 1, overwrite=True, display=Silence()).train()
    assert not [name for name in names(out) if name.startswith(".")]
    assert json.loads((out / "summary.json").read_text())["finished"]
