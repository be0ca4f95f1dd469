"""Starting several ranks for a test."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT

LONGEST = 400
"""Seconds for all that a launch does, on a busy machine."""


def launch(world_size: int, folder: Path, module: str, *arguments: str | Path) -> str | None:
    """Run a module on so many ranks as a launcher would; returns what all of them said if one of them failed.

    Args:
        folder: for what they say.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, said = [], [folder / f"rank-{rank}.txt" for rank in range(world_size)]
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        with said[rank].open("w") as output:
            command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
    deadline = time.monotonic() + LONGEST
    try:
        while (codes := [process.poll() for process in processes]) and None in codes:
            if any(codes) or time.monotonic() > deadline:  # the others would wait for it
                break
            time.sleep(0.1)
        failed = any(code != 0 for code in codes)
        time.sleep(2 if failed else 0)  # the others may say why, too
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return "\n".join(f"--- rank {i}:\n{file.read_text()[-4000:]}" for i, file in enumerate(said)) if failed else None
