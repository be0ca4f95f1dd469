"""Rows from every kind of source, and the ways to set validation rows aside."""

import csv
import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from hybrid_opt.config.data import Data
from hybrid_opt.errors import UserError
from hybrid_opt.objectives.batches import hold_out
from hybrid_opt.objectives.data import load_splits
from tests.conftest import PROSE

ROWS = [
    {"text": "A glass, half full", "number": 7},
    {"text": 'She said "no";\nhe left', "number": -1},
    {"text": "Grüße\taus Köln", "number": 0},
]
OTHER = [{"text": "held out", "number": 3}, {"text": "too", "number": 4}]


@pytest.fixture(autouse=True)
def cache_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITERS = {
    "rows.jsonl": write_lines,
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "rows.csv": write_csv,
    "rows.tsv": write_csv,
    "rows.parquet": lambda path, rows: Dataset.from_list(rows).to_parquet(path),
    "saved": lambda path, rows: Dataset.from_list(rows).save_to_disk(path),
}


def write(path: Path, rows: list[dict]) -> str:
    WRITERS[path.name](path, rows)
    return str(path)


def splits(train: str, **config) -> tuple[list[dict], list[dict] | None]:
    rows, held_out = load_splits(Data(train=train, text="text", **config))
    return rows.to_list(), held_out and held_out.to_list()


@pytest.fixture
def folder_of_files(tmp_path) -> str:
    (tmp_path / "files").mkdir()
    write_lines(tmp_path / "files/train.jsonl", ROWS)
    write_lines(tmp_path / "files/test.jsonl", OTHER)
    return str(tmp_path / "files")


@pytest.fixture
def saved_dict(tmp_path) -> str:
    DatasetDict(train=Dataset.from_list(ROWS), validation=Dataset.from_list(OTHER)).save_to_disk(tmp_path / "dict")
    return str(tmp_path / "dict")


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("name", WRITERS)
def test_rows_come_back_as_written(tmp_path, name):
    assert splits(write(tmp_path / name, ROWS)) == (ROWS, None)


def test_a_text_file_is_one_row(tmp_path):
    assert splits(str(PROSE)) == ([{"text": PROSE.read_text(encoding="utf-8")}], None)


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_words_that_pandas_takes_for_missing_values_stay_words(tmp_path, name):
    rows = [{"text": word, "number": 1} for word in ("NA", "null", "None", "nan", "glass")]
    assert splits(write(tmp_path / name, rows)) == (rows, None)


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_an_empty_cell_is_a_missing_value(tmp_path, name):
    rows = [{"text": "", "number": 1}, {"text": "glass", "number": 2}]
    assert splits(write(tmp_path / name, rows)) == ([{**rows[0], "text": None}, rows[1]], None)


@pytest.mark.parametrize(("split", "expected"), [("train", ROWS), ("validation", OTHER)])
def test_a_saved_dict_gives_the_split_asked_for(saved_dict, split, expected):
    assert splits(saved_dict, split=split) == (expected, None)


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize("name", WRITERS)
def test_validation_by_file(tmp_path, name):
    (tmp_path / "held").mkdir()
    train, held = write(tmp_path / "rows.jsonl", ROWS), write(tmp_path / "held" / name, OTHER)
    assert splits(train, validation=held) == (ROWS, OTHER)


def test_validation_by_name_of_a_split(saved_dict, folder_of_files):
    assert splits(saved_dict, validation="validation") == (ROWS, OTHER)
    assert splits(saved_dict, split="validation", validation="train") == (OTHER, ROWS)
    assert splits(folder_of_files, validation="test") == (ROWS, OTHER)


def test_validation_by_fraction_is_left_to_hold_out(tmp_path):
    assert splits(write(tmp_path / "rows.jsonl", ROWS), validation=0.5) == (ROWS, None)


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.5])
def test_held_out_rows_and_the_rest_are_everything_once(fraction):
    kept, held = hold_out(range(40), fraction, seed=3, at_end=False)
    assert len(held) == 40 * fraction
    assert sorted(kept + held) == list(range(40))
    assert (kept, held) == (sorted(kept), sorted(held))
    assert hold_out(range(40), fraction, seed=3, at_end=False) == (kept, held)
    assert hold_out(range(40), fraction, seed=4, at_end=False) != (kept, held)
    assert held != list(range(40))[-len(held) :]


def test_every_row_is_held_out_equally_often():
    counts = [0] * 10
    for seed in range(2000):
        for i in hold_out(range(10), 0.3, seed, at_end=False)[1]:
            counts[i] += 1
    assert all(abs(count - 600) < 4 * (2000 * 0.3 * 0.7) ** 0.5 for count in counts)


def test_of_a_running_text_the_end_is_held_out():
    assert hold_out(range(10), 0.3, seed=5, at_end=True) == (list(range(7)), [7, 8, 9])


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_fraction_that_leaves_a_side_empty_is_refused(fraction):
    with pytest.raises(UserError, match=rf"data\.validation: {fraction} of 10 examples leaves one side without any"):
        hold_out(range(10), fraction, seed=0, at_end=False)


# ---------------------------------------------------------------- built-in tasks

ONE_DIGIT = {"task": "arithmetic", "terms": 2, "largest": 9, "operators": "+"}


def task_splits(train: dict, validation=None) -> tuple[list[dict], list[dict] | None]:
    config = Data(train=train, validation=validation, prompt="{question}", completion="{answer}")
    rows, held_out = load_splits(config)
    return rows.to_list(), held_out and held_out.to_list()


def test_a_task_gives_its_rows_and_holds_others_out():
    train, held = task_splits({**ONE_DIGIT, "rows": 81}, {**ONE_DIGIT, "rows": 19})
    assert {(row["question"], row["answer"]) for row in train + held} == {
        (f"{a} + {b}", str(a + b)) for a in range(10) for b in range(10)
    }
    assert (len(train), len(held)) == (81, 19)


def test_a_task_says_its_split_itself():
    train, held = task_splits(
        {**ONE_DIGIT, "rows": 19, "split": "held_out"}, {**ONE_DIGIT, "rows": 19, "split": "held_out"}
    )
    assert train == held


def test_a_task_beside_a_file(tmp_path):
    train = write(tmp_path / "rows.jsonl", ROWS)
    rows, held = load_splits(Data(train=train, validation={**ONE_DIGIT, "rows": 2}, text="text"))
    assert (rows.to_list(), held.column_names) == (ROWS, ["question", "answer"])


def test_countdown_rows_keep_their_kinds():
    train, _ = load_splits(Data(train={"task": "countdown", "rows": 3}, prompt="{prompt}", completion="{answer}"))
    assert {name: feature.dtype for name, feature in train.features.items() if name != "numbers"} == {
        "target": "int64", "answer": "string", "prompt": "string"
    }  # fmt: skip
    assert train.features["numbers"].feature.dtype == "int64"


# ---------------------------------------------------------------- errors


def test_a_missing_split_of_a_saved_dict(saved_dict):
    with pytest.raises(
        UserError, match=r"no split 'validatoin' \(did you mean 'validation'\?\); it has train, validation"
    ):
        splits(saved_dict, validation="validatoin")
    with pytest.raises(UserError, match="no split 'all'; it has train, validation"):
        splits(saved_dict, split="all")


@pytest.mark.parametrize("name", WRITERS)
def test_a_single_table_has_no_other_split(tmp_path, name):
    with pytest.raises(UserError, match="only the split 'train', not 'test'"):
        splits(write(tmp_path / name, ROWS), validation="test")


def test_a_missing_split_of_a_folder_of_files(folder_of_files):
    with pytest.raises(UserError, match=r"^data\.validation: .*\"dev\".*\['train', 'test'\]"):
        splits(folder_of_files, validation="dev")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": oops}\n', "line 3: not JSON"),
        ("a.jsonl", '{"text": "Größe"}\n'.encode("latin-1"), "utf-8"),
        ("a.csv", "text\nGröße\n".encode("latin-1"), "utf-8"),
        ("a.csv", b"text,number\n", r"data\.train"),
        ("a.json", b'[{"text": "x"},', r"data\.train"),
        ("a.xls", b"x", r"cannot tell the format by its ending; use one of \.jsonl"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        splits(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(("key", "config"), [("train", {}), ("validation", {"validation": "no/such.csv"})])
def test_a_missing_file_is_named_with_its_key(tmp_path, key, config):
    train = "no/such.csv" if key == "train" else write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=rf"^data\.{key}: no/such\.csv: no such file$"):
        splits(train, **config)
