"""A fine-tune without weights: which model it starts from, and a packed ledger. Next: `../cli/recovering.py`.

One idea: an export is the least of a run folder that can still be replayed, so whoever has one needs nothing new to use it.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_opt.config.engines import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.recovery.ledger import encoded, whole_lines
from hybrid_opt.recovery.replaying import LEDGERS, find_ledger, read_run
from hybrid_opt.training.build import with_engine_dtype
from hybrid_opt.training.run_folder import dump_yaml


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    steps: int
    bytes: int
    """Of the packed ledger."""


def export(source: Path, folder: Path) -> Exported:
    """Write the run file and the packed ledger of a run whose every step is in its ledger.

    Raises:
        UserError: the folder is not empty, or steps are missing (backprop took some).
    """
    ledger, run = find_ledger(source), read_run(source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder}: it is there already; choose a new folder")
    lines = _all_lines(source, ledger)
    folder.mkdir(parents=True, exist_ok=True)
    engine = LocalEngine(type="local", master_weights=run.engine.master_weights)
    document = run.model_copy(update={"engine": engine, "model": with_engine_dtype(run)}).model_dump(
        mode="json", exclude_none=True
    )
    (folder / "run.yaml").write_text(dump_yaml(document), encoding="utf-8")
    packed = folder / LEDGERS[1]
    with gzip.GzipFile(packed, "wb", compresslevel=9, mtime=0) as file:
        for line in lines:
            file.write(f"{encoded(line)}\n".encode())
    return Exported(folder, len(lines) - 1, packed.stat().st_size)


def _all_lines(source: Path, ledger: Path) -> list[dict[str, Any]]:
    """The ledger's documents, the first of which is no step."""
    documents = [line.document for line in whole_lines(ledger)]
    steps = [document.get("step") for document in documents[1:]]
    summary = source / "summary.json"
    taken = json.loads(summary.read_bytes())["steps"] if summary.is_file() else len(steps)
    if not steps or steps != list(range(taken)):
        missing = next((step for step in range(taken) if step not in set(steps)), 0)
        raise UserError(
            f"{ledger}: step {missing} is not in it, so base model and ledger do not give the final weights (steps of backprop, "
            "stale_gradient and guided never are); share the folder model/ instead"
        )
    return documents
