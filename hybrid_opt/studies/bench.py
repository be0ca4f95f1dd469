"""Times the rows of `hybrid-opt bench` against plain inference, or plain generation. Next: `bench_table.py`, which shows the result.

One idea: a machine's speed drifts, so rows take turns, and a row's ratio to its reference is taken within a turn; the median
over the turns is reported. Memory is measured before, when this process holds no model yet.
"""

import gc
import importlib.metadata
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hybrid_opt.config.run import Model
from hybrid_opt.errors import UserError
from hybrid_opt.models.loading import architecture
from hybrid_opt.run_files.durable import CannotWriteError, write_atomically
from hybrid_opt.studies.bench_memory import Memory, row_memory
from hybrid_opt.studies.bench_plan import GENERATION_ROWS, MEMBER_ROWS, Case, master_weights_of, reference_of
from hybrid_opt.studies.bench_rows import FAILURES, OUT_OF_MEMORY, Step, build_step, load_for, problem_of

Say = Callable[[str], None]
"""Is told what is being measured."""
_WITHOUT_MASTERS = ("inference", "mezo_loop", "generate")


@dataclass
class Timing:
    """What was measured of a row."""

    memory: Memory
    seconds: list[float] = field(default_factory=list)
    """Duration of a step, one a turn."""
    problem: str | None = None
    """Why there are no durations."""


def ready_cases(cases: Sequence[Case], names: Sequence[str] = ()) -> list[Case]:
    """The cases with `auto` replaced by a device, once they and these rows are known to fit model and machine. Loads no weights.

    Raises:
        UserError: no such model, more tokens than it has positions, or no such device.
    """
    cuda = torch.cuda.is_available()
    if not cuda and any(case.device == "cuda" for case in cases):
        raise UserError("command line: --device cuda: torch finds no CUDA device; write --device cpu or --device auto")
    try:
        config = architecture(Model(name=cases[0].model))
    except UserError as error:
        raise UserError(f"command line: MODEL: {str(error).removeprefix('model.name: ')}") from None
    longest = max(cases, key=lambda case: case.length(names))
    length = longest.length(names)
    if length > (positions := getattr(config, "max_position_embeddings", None) or length):
        options, together = f"--tokens {longest.tokens}", ""
        if length > longest.tokens:
            options, together = f"{options} and --new-tokens {longest.new_tokens}", " together"
        raise UserError(
            f"command line: {options}: the model has only {positions} positions; write {positions} or fewer{together}"
        )
    auto = "cuda" if cuda else "cpu"
    return [replace(case, device=auto) if case.device == "auto" else case for case in cases]


def measure_case(case: Case, names: Sequence[str], *, repeats: int, memory: bool, say: Say) -> list[dict[str, Any]]:
    """Measure the rows of these names, their references among them, and return one dictionary for each; see `_result`.

    Raises:
        UserError: the model cannot be loaded.
    """
    found = {name: Timing(Memory()) for name in names}
    for name in names if memory else ():
        say(f"{case.title}: memory of {name}")
        found[name] = Timing(row_memory(name, case))
        if found[name].memory.problem == OUT_OF_MEMORY and case.device == "cpu":
            found[name].problem = OUT_OF_MEMORY  # timing it would let the system end this process too
    _take_turns(case, found, repeats, say)
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()  # the next case's memory is measured by other processes, which need the room
    return [_result(name, case, timing, found[reference_of(name)]) for name, timing in found.items()]


def write_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as a JSON list; the file is whole at any moment.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_atomically(path, json.dumps(rows, indent=2) + "\n")
    except CannotWriteError as error:
        raise UserError(f"command line: --json {error}") from None


def machine_name(device: str) -> str:
    """The GPU's or the processor's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpu.read_text(), re.MULTILINE) if cpu.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


class _Rows:
    """A case's rows around one model, whose weights are put back after every step: a row must not disturb the next."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.steps: dict[str, Step] = {}
        self.model = load_for("inference", case)
        self.originals = [p.detach().clone() for p in self.model.parameters()]

    def build(self, name: str) -> None:
        """Make a row ready to take steps."""
        adapted = name == "lora"  # peft changes the model that it is given, so that row has its own
        self.steps[name] = build_step(name, self.case, load_for(name, self.case) if adapted else self.model)

    def seconds(self, name: str) -> float:
        """How long a step of the row takes."""
        try:
            return seconds_of(self.steps[name], self.case.device)
        finally:
            with torch.no_grad():
                for p, original in zip(self.model.parameters(), self.originals, strict=True):
                    p.copy_(original)


def _take_turns(case: Case, found: dict[str, Timing], repeats: int, say: Say) -> None:
    """Fill in the durations. Turn 0 builds the rows one after another, warms them up, and is not kept."""
    say(f"{case.title}: loading the model")
    rows = _Rows(case)
    for turn in range(repeats + 1):
        say(f"{case.title}: turn {turn} of {repeats}" if turn else f"{case.title}: warm-up")
        for name in [name for name, timing in found.items() if timing.problem is None]:
            try:
                if turn == 0:
                    rows.build(name)
                seconds = rows.seconds(name)
            except FAILURES as error:
                rows.steps.pop(name, None)
                found[name].seconds.clear()
                found[name].problem = problem_of(error)
            else:
                found[name].seconds += [seconds] if turn else []


def seconds_of(step: Step, device: str) -> float:
    """How long a step takes."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    begun = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - begun


def _result(name: str, case: Case, timing: Timing, reference: Timing) -> dict[str, Any]:
    """A row in plain values, for the table and for JSON. What was not measured is None.

    tokens_per_second counts every token of every member, members * examples * tokens a step, in all rows alike; in rows
    that write, the tokens written.
    evaluations_per_second counts losses: of each member (inference, ES, MeZO), or of all rows at once (backprop).
    ratio_to_inference (ratio_to_generate in rows that write; `reference` says which) is the median over the turns of the
    reference's seconds by the row's: 1 is as fast.
    """
    seconds, against = timing.seconds, reference_of(name)
    median = statistics.median(seconds) if seconds else None
    ratios = [i / s for i, s in zip(reference.seconds, seconds, strict=True)] if reference.seconds and seconds else []
    peak, base = timing.memory.peak_bytes, reference.memory.peak_bytes
    writes = name in GENERATION_ROWS
    counted = case.members * case.examples * (case.new_tokens if writes else case.tokens)
    return {
        "name": name,
        "model": case.model,
        "dtype": case.dtype,
        "members": case.members,
        "examples": case.examples,
        "tokens": case.tokens,
        "new_tokens": case.new_tokens if writes else None,
        "members_per_forward": case.members_per_forward,
        "master_weights": master_weights_of(name, case) if name not in _WITHOUT_MASTERS else None,
        "seconds": list(seconds),
        "seconds_median": median,
        "seconds_min": min(seconds, default=None),
        "seconds_max": max(seconds, default=None),
        "tokens_per_second": counted / median if median else None,
        "evaluations_per_second": (case.members if name in MEMBER_ROWS else 1) / median if median else None,
        "reference": against,
        f"ratio_to_{against}": statistics.median(ratios) if ratios else None,
        "ratio_min": min(ratios, default=None),
        "ratio_max": max(ratios, default=None),
        "peak_memory_bytes": peak,
        "loaded_memory_bytes": timing.memory.loaded_bytes,
        f"memory_ratio_to_{against}": peak / base if peak and base else None,
        "problem": timing.problem,
        "memory_problem": timing.memory.problem,
        "device": case.device,
        "machine": machine_name(case.device),
        "threads": torch.get_num_threads(),
        "versions": {library: _version(library) for library in ("torch", "transformers", "hybrid_opt")},
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # run from the source folder without being installed
        return None
