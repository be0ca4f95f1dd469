"""`hybrid-opt bench --distributed`: a population on several ranks against the same on one. Next: `bench_table.py`.

One idea: all ranks are there from the beginning, and in each turn rank 0 first takes the step alone while the others sleep, then
all take it together, so both durations belong to one moment of one machine. This file is both ends, like `bench_memory.py`.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from hybrid_opt.config.engines import ZeroEngine
from hybrid_opt.engines.ranks import Ranks, free_port
from hybrid_opt.errors import UserError
from hybrid_opt.objectives.causal_lm import CausalLmObjective
from hybrid_opt.studies.bench import Say, machine_name, seconds_of
from hybrid_opt.studies.bench_memory import row_memory
from hybrid_opt.studies.bench_plan import Case
from hybrid_opt.studies.bench_rows import build_schedule, load_for, token_batch
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer

STRETCH_ROWS = ("es_stretch", "es_stretch_moved")
"""ES steps after a backprop step under ZeRO-2, the optimizer's state on the device or moved off it (`offload_idle_after`)."""


def measure_distributed(case: Case, ranks: int, *, repeats: int, memory: bool, say: Say) -> list[dict[str, Any]]:
    """A row for one rank, a row for all ranks, and rows on the memory of an ES stretch, as plain values.

    efficiency is the median over the turns of `seconds on one rank / (ranks * seconds on all)`: 1 is perfect.

    Raises:
        UserError: a rank failed.
    """
    say(f"{case.title}: {ranks} ranks with one thread each")
    seconds = _run_ranks(case, ranks, repeats)
    efficiencies = [one / (ranks * all_) for one, all_ in zip(*seconds, strict=True)]
    common = {**asdict(case), "machine": machine_name(case.device), "threads": 1}
    rows = [
        {
            **common,
            "name": "es_low_rank",
            "ranks": count,
            "seconds": durations,
            "seconds_median": statistics.median(durations),
        }
        for count, durations in zip((1, ranks), seconds, strict=True)
    ]
    rows[0]["efficiency"], rows[0]["efficiency_min"], rows[0]["efficiency_max"] = 1.0, 1.0, 1.0
    rows[1]["efficiency"] = statistics.median(efficiencies)
    rows[1]["efficiency_min"], rows[1]["efficiency_max"] = min(efficiencies), max(efficiencies)
    base = None
    for name in ("inference", *STRETCH_ROWS) if memory else ():
        say(f"{case.title}: memory of {name}")
        found = row_memory(name, case)
        base = base or found.peak_bytes
        ratio = found.peak_bytes / base if found.peak_bytes and base else None
        rows.append(
            {
                **common,
                "name": name,
                "ranks": 1,
                "peak_memory_bytes": found.peak_bytes,
                "memory_ratio_to_inference": ratio,
            }
            | {"problem": found.problem}
        )
    return rows


def _run_ranks(case: Case, ranks: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each turn's step on one rank and on all."""
    order = json.dumps({"case": asdict(case), "repeats": repeats})
    command = [sys.executable, "-m", "hybrid_opt.studies.bench_distributed", order]
    places = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **places, **threads, "RANK": str(r), "LOCAL_RANK": str(r)}, **pipes
        )
        for r in range(ranks)
    ]
    try:
        said = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, words) in zip(processes, said, strict=True):
        if process.returncode:
            last = next((line for line in reversed(words.splitlines()) if line.strip()), "it said nothing")
            raise UserError(
                f"command line: --distributed: a rank ended with status {process.returncode}: {last.strip()}"
            )
    return tuple(json.loads(said[0][0].splitlines()[-1]))


def main(order: str) -> None:
    """Take the turns as one of the ranks; rank 0 prints its seconds as a line of JSON."""
    wanted = json.loads(order)
    case = Case(**wanted["case"])
    torch.set_num_threads(1)
    model = load_for("inference", case)
    engine = ZeroEngine(type="zero", zero_stage=1, master_weights="none", check_every=0)
    hybrid = HybridOptimizer(model, CausalLmObjective(), schedule=build_schedule("es_low_rank", case), engine=engine)
    batch, ranks = token_batch(case, model, 1), hybrid.engine.ranks
    alone, together = [], []
    for turn in range(wanted["repeats"] + 1):
        if ranks.rank == 0:
            with _as_one_rank(hybrid):
                seconds = seconds_of(lambda: hybrid.step(batch), case.device)
            alone += [seconds] if turn else []
        ranks.wait()
        seconds = seconds_of(lambda: hybrid.step(batch), case.device)
        together += [seconds] if turn else []
        ranks.wait()
    hybrid.engine.leave()
    if ranks.rank == 0:
        print(json.dumps([alone, together]))


@contextmanager
def _as_one_rank(hybrid: HybridOptimizer) -> Iterator[None]:
    """Inside, this rank does the work of all. Only ES acts, on whole weights, so nothing else knows of the ranks."""
    ranks, signals = hybrid.engine.ranks, hybrid.signals
    hybrid.engine.ranks = Ranks()
    try:
        yield
    finally:
        hybrid.engine.ranks, hybrid.signals = ranks, signals


if __name__ == "__main__":
    main(sys.argv[1])
