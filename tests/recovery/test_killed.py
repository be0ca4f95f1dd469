"""A run that is killed at any moment and resumed ends with the weights of one that was left alone, bit for bit."""

import json
import subprocess
import sys

from tests.conftest import ROOT
from tests.recovery.killing import KILLS, MOMENTS


def test_a_killed_run_loses_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.recovery.killing", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert sum(counts.values()) >= KILLS
    assert all(counts[moment] for moment in ("timer", *MOMENTS)), counts
