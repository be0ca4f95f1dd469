"""All that `hybrid-opt plan` predicts of a run. Next: `prediction.py`, `traffic.py`, `tables.py`."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from hybrid_opt.config.foreign_code import code_of
from hybrid_opt.config.run import RunFile
from hybrid_opt.engines.deepspeed_config import DeepSpeedSettings
from hybrid_opt.objectives.contract import count_tokens
from hybrid_opt.planning.batches import largest_batches
from hybrid_opt.planning.calibration import Measured, alone, measured
from hybrid_opt.planning.checking import size
from hybrid_opt.planning.prediction import Predictor
from hybrid_opt.planning.step_memory import PretendedModel
from hybrid_opt.planning.tables import document, memory_tables, notes, totals_table
from hybrid_opt.planning.traffic import Totals, totals_of
from hybrid_opt.reports.wording import duration


def planned(
    run: RunFile,
    steps: int,
    world_size: int,
    *,
    calibrate: bool,
    allow_code: bool,
    write: Callable[[dict[str, Any]], None],
) -> Iterator[Table | Text]:
    """Tables of memory by phase and of totals, and what was measured if that is asked for.

    Args:
        steps: of the run.
        world_size: processes; counts under ZeRO.
        write: takes all numbers in plain values.
    """
    if not allow_code and any(key.startswith("objective") for key, _ in code_of(run)):
        yield Text("memory: not predicted, because the objective is code; look at it, and say --allow-code")
        return
    ranks = world_size if run.engine.type == "zero" else 1
    dtype = (
        run.model.dtype
        if run.engine.type == "local"
        else DeepSpeedSettings(run.engine).dtype(run.model.dtype, given=False)
    )
    device = _device(run)
    model, batches = PretendedModel(run.model, run.peft, dtype), largest_batches(run)
    predictor = Predictor(run, model, batches, world_size=ranks, device=device)
    predictions = predictor.phases()
    yield from memory_tables(predictions, ranks)
    totals = totals_of(
        run,
        steps,
        tokens={name: count_tokens(batch.values) for name, batch in batches.items()},
        owned={name: predictor.values_of(names) for name, names in predictor.owned.items()},
        weights=model.weight_bytes // predictor.width,
        width=predictor.width,
        world_size=ranks,
    )
    yield totals_table(totals, ranks)
    yield from notes((name for name in predictor.names if name not in batches), device)
    found = document(predictions, totals)
    if calibrate:
        rows = {}
        for who, one in alone(run).items():
            phase = Predictor(one, model, batches, world_size=ranks, device=device).phases()[0]
            rows[who] = (phase.peak, measured(one, allow_code=allow_code))
        found["calibration"] = {who: {"predicted_bytes": p, **asdict(m)} for who, (p, m) in rows.items()}
        yield from _calibration(rows, totals)
    write(found)


def _calibration(rows: dict[str, tuple[int, Measured]], totals: dict[str, Totals]) -> Iterator[Table | Text]:
    table = Table(
        "who acts",
        "seconds a step",
        "steps",
        "time",
        "peak predicted",
        "measured",
        "ratio",
        title="alone, and together",
        title_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    together = next((who for who in rows if "+" in who), None)
    whole = 0.0
    for who, (peak, found) in rows.items():
        steps = max((total.steps for name, total in totals.items() if name in who.split("+")), default=0)
        counts = together is None or who == together
        whole += found.seconds * steps * counts
        times = (f"{steps:,}", duration(found.seconds * steps)) if counts else ("", "")
        table.add_row(who, f"{found.seconds:.3g}", *times, size(peak), size(found.peak), f"{peak / found.peak:.2f}")
    yield table
    yield Text(f"steps of the run: about {duration(whole)}; evaluations, probes and checkpoints come on top")


def _device(run: RunFile) -> str:
    wanted = getattr(run.engine, "device", "auto")
    return "cuda" if wanted.startswith("cuda") or (wanted == "auto" and torch.cuda.is_available()) else "cpu"
