"""From the `data` section of a run file to rows, by Hugging Face datasets. Next: `examples.py`.

One idea: whatever `datasets.load_dataset` reads can be trained on, and so can a built-in task; here is only the choice of reader
and of the split.
"""

import os
from pathlib import Path

import datasets

from hybrid_opt.config.data import Data
from hybrid_opt.config.tasks import Task
from hybrid_opt.errors import UserError, did_you_mean
from hybrid_opt.objectives import jsonl
from hybrid_opt.tasks.rows import rows_of

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
_CSV = {"keep_default_na": False, "na_values": [""]}  # "NA", "null" and "None" are words; only an empty cell is missing
OPTIONS = {".txt": {"sample_by": "document"}, ".csv": _CSV, ".tsv": {"sep": "\t", **_CSV}}


def load_splits(config: Data) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Rows to train on, and held-out rows if a file or a split is given for them (a fraction is set aside later).

    Raises:
        UserError: nothing can be read there, a split does not exist, or it has no rows.
    """
    train = _rows(config.train, config.subset, config.split, "data.train")
    if isinstance(config.validation, Task):
        return train, _rows(config.validation, None, "train", "data.validation")
    if not isinstance(config.validation, str):
        return train, None
    if _is_file(config.validation):
        return train, _load(config.validation, None, "train", "data.validation")
    return train, _load(config.train, config.subset, config.validation, "data.validation")


def _rows(source: str | Task, subset: str | None, split: str, key: str) -> datasets.Dataset:
    if isinstance(source, Task):
        return datasets.Dataset.from_list(rows_of(source, key))
    return _load(source, subset, split, key)


def _is_file(name: str) -> bool:
    return os.path.exists(name) or Path(name).suffix in READERS


def _load(source: str, subset: str | None, split: str, key: str) -> datasets.Dataset:
    path = Path(source)
    if path.suffix in READERS and not os.path.exists(path):  # False too for a name that no file can have
        raise UserError(f"{key}: {source}: no such file")
    datasets.disable_progress_bars()  # they would tear the run's own progress display
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said here, once
    try:
        rows = _read(path, source, subset, split)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    except Exception as error:  # datasets, pyarrow and readers of other formats raise many kinds
        if path.suffix == ".jsonl":
            try:
                jsonl.columns(path)  # raises with the broken line's number
            except UserError as found:
                raise UserError(f"{key}: {found}") from None
        if "corresponds to no data" in str(error):
            raise UserError(f"{key}: {source}: the file holds no rows") from None
        raise UserError(f"{key}: {source}: {_first_line(error)}{_known_splits(error, split)}") from None
    if len(rows) == 0:
        raise UserError(f"{key}: {source}: the split {split!r} holds no rows")
    return rows


def _read(path: Path, source: str, subset: str | None, split: str) -> datasets.Dataset:
    if os.path.isfile(path):
        if path.stat().st_size == 0:
            raise UserError(f"{source}: the file is empty")
        if path.suffix not in READERS:
            raise UserError(f"{source}: cannot tell the format by its ending; use one of {', '.join(READERS)}")
        options = OPTIONS.get(path.suffix, {})
        if path.suffix in (".jsonl", ".json"):  # datasets' reader would pass on bytes that are not UTF-8
            with path.open(encoding="utf-8") as lines:
                for _ in lines:
                    pass
        if split != "train":
            raise UserError(f"{source}: a single file has only the split 'train', not {split!r}")
        return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", **options)
    if os.path.isdir(path) and any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.Dataset):
            if split != "train":
                raise UserError(f"{source}: a saved Dataset has only the split 'train', not {split!r}")
            return saved
        if split not in saved:
            raise UserError(
                f"{source}: there is no split {split!r}{did_you_mean(split, saved)}; it has {', '.join(saved)}"
            )
        return saved[split]
    return datasets.load_dataset(source, subset, split=split)


def _first_line(error: Exception) -> str:
    return str(error.__cause__ or error).splitlines()[0] if str(error) else type(error).__name__


def _known_splits(error: Exception, split: str) -> str:
    return f" (asked for split {split!r})" if "split" in str(error).lower() else ""
