"""The ledger: what can be read is true, whatever happened to the file."""

import base64
import gzip
import json
import random

import numpy as np
import pytest

from hybrid_opt.errors import UserError
from hybrid_opt.recovery.ledger import Ledger, encoded, read_steps, whole_lines
from tests.conftest import token_batch
from tests.damage import damaged
from tests.recovery.test_records import ES, optimizer_of

MODEL = {"parameters": "ab", "layout": {"ranks": 1}, "weights": "cd"}


def ledger_of(path, *steps: int) -> Ledger:
    ledger = Ledger(path, MODEL)
    ledger.begin()
    for step in steps:
        ledger.append({"step": step, "parts": []})
    return ledger


def steps_in(path) -> list[int]:
    return [line.step for line in whole_lines(path, MODEL)][1:]


def test_a_line_is_json_and_says_whether_it_is_whole(tmp_path):
    ledger_of(tmp_path / "l", 0, 1)
    first, *rest = map(json.loads, (tmp_path / "l").read_text().splitlines())
    assert first | MODEL == first
    assert [line["step"] for line in rest] == [0, 1]
    assert steps_in(tmp_path / "l") == [0, 1]


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_line_that_is_cut_off_is_as_if_it_had_not_been_written(tmp_path, cut):
    path = tmp_path / "l"
    ledger_of(path, 0, 1, 2)
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps_in(path) == [0, 1]
    again = Ledger(path, MODEL)
    again.go_on_at(2)
    again.append({"step": 2, "parts": []})
    assert steps_in(path) == [0, 1, 2]


def test_nothing_is_read_beyond_a_changed_byte(tmp_path):
    path = tmp_path / "l"
    ledger_of(path, 0, 1, 2)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    begin = len(lines[0]) + len(lines[1])
    for place in range(begin, begin + len(lines[2])):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert steps_in(path) == [0]
    with pytest.raises(UserError, match="the record of step 1 is missing or damaged"):
        list(read_steps(path, 0, 3, MODEL))


@pytest.mark.parametrize("packed", [False, True])
def test_any_damage_leaves_true_lines_only(tmp_path, packed):
    path, luck, shorter = tmp_path / ("l.gz" if packed else "l"), random.Random(0), 0
    ledger_of(tmp_path / "l", *range(12))
    if packed:
        path.write_bytes(gzip.compress((tmp_path / "l").read_bytes(), mtime=0))
    whole, content = [line.document for line in whole_lines(path, MODEL)], path.read_bytes()
    for _ in range(400):
        path.write_bytes(damaged(content, luck))
        read = [line.document for line in whole_lines(path, MODEL)]
        assert read == whole[: len(read)]
        shorter += len(read) < len(whole)
    assert shorter >= 300


def test_steps_that_were_taken_again_replace_the_former_ones(tmp_path):
    path = tmp_path / "l"
    ledger_of(path, 0, 1, 2, 3)
    again = Ledger(path, MODEL)
    again.go_on_at(2)
    assert steps_in(path) == [0, 1]
    assert again.reaches(0, 2)


def test_a_step_that_is_missing_ends_what_is_reached(tmp_path):
    ledger = ledger_of(tmp_path / "l", 0, 1, 4, 5)
    assert ledger.reaches(4, 6)
    assert not ledger.reaches(1, 6)
    assert not ledger.reaches(4, 5)
    assert ledger.reaches(9, 9)
    assert [d["step"] for d in read_steps(ledger.path, 4, 6, MODEL)] == [4, 5]
    with pytest.raises(UserError, match="the record of step 2 is missing"):
        list(read_steps(ledger.path, 1, 6, MODEL))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"parameters": "x"}, "parameters have other names or shapes"),
        ({"weights": "x"}, "it begins with other weights than the model has now"),
        ({"layout": {"ranks": 2}, "weights": "x"}, None),
    ],
)
def test_another_model_is_refused(tmp_path, changed, message):
    ledger_of(tmp_path / "l", 0)
    if message is None:
        assert len(list(whole_lines(tmp_path / "l", MODEL | changed))) == 2
        return
    with pytest.raises(UserError, match=message):
        list(whole_lines(tmp_path / "l", MODEL | changed))


def test_a_packed_ledger_that_is_cut_off_has_no_steps_beyond(tmp_path):
    ledger = ledger_of(tmp_path / "l", *range(50))
    packed = gzip.compress(ledger.path.read_bytes())
    for size in (0, 5, 40, len(packed) - 9):
        (tmp_path / "l.gz").write_bytes(packed[:size])
        found = steps_in(tmp_path / "l.gz")
        assert found == list(range(len(found)))
    (tmp_path / "l.gz").write_bytes(packed)
    assert steps_in(tmp_path / "l.gz") == list(range(50))


def test_10_000_steps_of_a_population_of_32_take_less_than_a_megabyte():
    optimizer = optimizer_of({**ES, "population_size": 32})
    taken = optimizer.step(token_batch()).record.document(optimizer.engine)
    (part,) = taken["parts"]
    (noise,), draw = part["sums"], np.random.default_rng(0)

    def line(step: int) -> str:
        coefficients = base64.b64encode(draw.standard_normal(16).astype("<f4").tobytes()).decode()
        sums = [{**noise, "origin": [3, step, "own"], "coefficients": coefficients}]
        return encoded({**taken, "step": step, "parts": [{**part, "sums": sums}]})

    packed = gzip.compress("\n".join(map(line, range(10_000))).encode(), 9)
    assert 16 * 4 * 10_000 < len(packed) < 1_000_000  # random coefficients cannot be packed any further
