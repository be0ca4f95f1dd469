"""A fine-tune without weights: which model it starts from, and a packed ledger. Next: `../cli/recovering.py`.

One idea: an export is the least of a run folder that can still be replayed, so whoever has one needs nothing new to use it.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_opt.config.engines import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.recovery.ledger import PACKED, encoded, whole_lines
from hybrid_opt.recovery.replaying import find_ledger, read_run, refuse_present
from hybrid_opt.run_files.durable import write_atomically
from hybrid_opt.run_files.run_folder import RunFolder
from hybrid_opt.training.build import with_engine_dtype


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
    refuse_present(folder)
    lines = _all_lines(source, ledger)
    folder.mkdir(parents=True, exist_ok=True)
    engine = LocalEngine(type="local", master_weights=run.engine.master_weights)
    document = run.model_copy(update={"engine": engine, "model": with_engine_dtype(run)}).model_dump(
        mode="json", exclude_none=True
    )
    packed = gzip.compress("".join(f"{encoded(line)}\n" for line in lines).encode(), mtime=0)
    RunFolder(folder).write_config(document)
    write_atomically(folder / PACKED, packed)
    return Exported(folder, len(lines) - 1, len(packed))


def _all_lines(source: Path, ledger: Path) -> list[dict[str, Any]]:
    """The ledger's documents, the first of which is no step."""
    documents = [line.document for line in whole_lines(ledger)]
    steps = [document.get("step") for document in documents[1:]]
    summary = RunFolder(source).finished()
    taken = summary["steps"] if summary else len(steps)
    if not steps or steps != list(range(taken)):
        missing = next((step for step in range(taken) if step not in set(steps)), 0)
        raise UserError(
            f"{ledger}: step {missing} is not in it, so base model and ledger do not give the final weights (steps of backprop, "
            "stale_gradient and guided never are); share the folder model/ instead"
        )
    return documents
