"""Peak memory of one row of `hybrid-opt bench`, measured in a process of its own. Next: `bench.py`.

One idea: a process that has done nothing but load the model has no peak of somebody else's. This file is both ends:
`row_memory` starts `python -m hybrid_opt.studies.bench_memory '{...}'`, whose `main` answers with a line of JSON.
"""

import gc
import json
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch

from hybrid_opt.machine.memory import forget_peak, peak_memory_bytes, present_memory_bytes
from hybrid_opt.studies.bench_plan import Case
from hybrid_opt.studies.bench_rows import FAILURES, OUT_OF_MEMORY, build_step, load_for, problem_of


@dataclass(frozen=True)
class Memory:
    """What a row's process used: on CUDA what torch allocated there, elsewhere the whole process, libraries included."""

    peak_bytes: int | None = None
    """Most memory during two steps; None if it could not be measured."""
    loaded_bytes: int | None = None
    """Memory with model and optimizer made, before the first step; None where the system does not tell."""
    problem: str | None = None
    """Why there is no peak."""


def row_memory(row: str, case: Case) -> Memory:
    """A row's memory, from a fresh process, which is gone when this returns or is interrupted."""
    order = json.dumps({"row": row, "case": asdict(case), "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "hybrid_opt.studies.bench_memory", order]
    status, output, words = _run(command)
    if status == 0:
        return Memory(**json.loads(output.splitlines()[-1]))
    if status == -getattr(signal, "SIGKILL", 9):  # how the system ends a process for want of memory
        return Memory(problem=OUT_OF_MEMORY)
    last = next((line for line in reversed(words.splitlines()) if line.strip()), "it said nothing")
    return Memory(problem=f"its process ended with status {status}: {last.strip()}")


def _run(command: list[str]) -> tuple[int, str, str]:
    """A process's exit status and what it wrote to stdout and stderr, none of which reaches the terminal."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **streams, text=True, encoding="utf-8", errors="replace") as process:
        try:
            output, words = process.communicate()
        finally:
            process.kill()  # does nothing to a process that has ended
            process.wait()
    return process.returncode, output, words


def measure(row: str, case: Case) -> Memory:
    """A row's memory in this process: load the model, forget the peak so far, take two steps."""
    device = torch.device(case.device)
    try:
        step = build_step(row, case, load_for(row, case))
        gc.collect()
        forget_peak(device)
        loaded = present_memory_bytes(device)
        for _ in range(2):
            step()
        return Memory(peak_memory_bytes(device) or None, loaded)
    except FAILURES as error:
        return Memory(problem=problem_of(error))


def main(order: str) -> None:
    """Measure what `row_memory` ordered and print it as a line of JSON."""
    wanted = json.loads(order)
    torch.set_num_threads(wanted["threads"])
    print(json.dumps(asdict(measure(wanted["row"], Case(**wanted["case"])))))


if __name__ == "__main__":
    main(sys.argv[1])
