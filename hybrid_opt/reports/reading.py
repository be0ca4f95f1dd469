"""From the folder of a run or a study to plain values. Next: `content.py`.

One idea: a run under way, an interrupted one and one from an older version are read like a finished one; what they lack is
said in `remarks`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybrid_opt.errors import UserError
from hybrid_opt.reports.files import read_csv, read_lines, read_mapping, read_text
from hybrid_opt.reports.records import Evaluation, Run, Step, Study, StudyRun
from hybrid_opt.run_files.run_folder import RunFolder
from hybrid_opt.studies.study_folder import StudyFolder
from hybrid_opt.training.goal import goal_of, own_losses

KEYS = ("task", "budget", "arm")


def read_folder(folder: Path) -> Run | Study:
    """The run or the study in a folder.

    Raises:
        UserError: it is no folder, holds neither, or a file in it is damaged.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}; give the folder that `train` or `ablate` wrote (`output` in its file)")
    run, study = RunFolder(folder), StudyFolder(folder)
    of_a_run = (run.metrics, run.summary, run.config)
    if study.index.exists():
        return read_study(folder)
    if any(path.exists() for path in of_a_run):
        return read_run(folder)
    raise UserError(
        f"{folder}: neither a run (it has none of {', '.join(path.name for path in of_a_run)}) nor a study (it has no {study.index.name}); "
        "give the folder that `train` or `ablate` wrote (`output` in its file)"
    )


# ---------------------------------------------------------------- a run


def read_run(folder: Path) -> Run:
    """The run in a folder, whatever it has recorded so far."""
    files = RunFolder(folder)
    lines, cut = read_lines(files.metrics)
    evaluations = read_evaluations(folder)
    steps = tuple(_step(row, files.metrics, number) for number, row in enumerate(lines, 1))
    summary, machine = read_mapping(files.summary), read_mapping(files.machine)
    config_text = read_text(files.config) or ""
    return Run(
        title=folder.resolve().name,
        config=read_mapping(files.config),
        config_text=config_text,
        machine=machine,
        steps=steps,
        evaluations=evaluations,
        summary=summary,
        remarks=tuple(_remarks(summary, machine, config_text, lines, cut)),
        goal=summary.get("goal") or goal_of(lines[0] if lines else {}),
    )


def _remarks(summary: Any, machine: Any, config_text: Any, lines: Any, cut: Any) -> Iterator[str]:
    if not summary:
        yield "summary.json is missing: the run is under way or was interrupted, so this is what there is so far."
    if cut:
        yield "The last line of metrics.jsonl is half written and was left out."
    if not machine:
        yield "machine.json is missing, so versions and machine are unknown: an older version made this run."
    if not config_text:
        yield "run.yaml is missing: the run was built in Python, so its configuration is not known."
    if lines and "forward_equivalents" not in lines[0]:
        yield (
            "metrics.jsonl has no forward-equivalents, update norms and statistics: an older version made this run. "
            "What needs them is left out."
        )


def read_evaluations(folder: Path) -> tuple[Evaluation, ...]:
    """All evaluations of a run."""
    path = RunFolder(folder).evaluations
    rows, _ = read_lines(path)
    return tuple(_evaluation(row, path, number) for number, row in enumerate(rows, 1))


def _step(row: dict[str, Any], path: Path, line: int) -> Step:
    names = ("step", "weights", "loss", "forwards", "backwards", "tokens", "seconds")
    number, *values = (_need(row, name, path, line) for name in names)
    return Step(
        number,
        *values,
        forward_equivalents=row.get("forward_equivalents"),
        peak_memory_bytes=row.get("peak_memory_bytes"),
        parts=row.get("parts") or {},
        update_norms=row.get("update_norms"),
        reward=row.get("reward"),
        own=own_losses(row),
        decision=row.get("decision"),
        account=row.get("account"),
    )


def _evaluation(row: dict[str, Any], path: Path, line: int) -> Evaluation:
    totals = {name: _need(row, name, path, line) for name in ("step", "seconds", "tokens")}
    totals["forward_equivalents"] = row.get("forward_equivalents")
    return Evaluation(measures={name: value for name, value in row.items() if name not in totals}, **totals)


def _need(row: dict[str, Any], name: str, path: Path, line: int) -> Any:
    if name not in row:
        raise UserError(f"{path}: line {line}: no key {name!r}; mend or delete the line")
    return row[name]


# ---------------------------------------------------------------- a study


def read_study(folder: Path) -> Study:
    """The study in a folder, with as many of its runs as there are so far."""
    files = StudyFolder(folder)
    path = files.index
    index = read_mapping(path)
    for name in ("tasks", "budgets", "arms", "seeds", "runs"):
        if not isinstance(index.get(name), list):
            raise UserError(f"{path}: no list {name!r}; run the study again to write the file anew")
    summary, results = read_csv(files.summary, texts=KEYS), read_csv(files.results, texts=KEYS)
    missing = [file.name for file, rows in ((files.summary, summary), (files.results, results)) if not rows]
    return Study(
        title=index.get("title") or folder.resolve().name,
        description=index.get("description") or "",
        reference=index.get("reference"),
        metric=index.get("metric"),
        metric_better=index.get("metric_better") or "higher",
        **{name: tuple(index[name]) for name in ("tasks", "budgets", "arms", "seeds")},
        runs=tuple(_study_run(folder, row, path) for row in index["runs"]),
        details=_details(folder, index["runs"]),
        summary=tuple(summary),
        results=tuple(results),
        config_text=read_text(files.study) or "",
        remarks=tuple(f"{name} has no rows yet: the study has not finished a run." for name in missing),
    )


def _study_run(folder: Path, row: dict[str, Any], path: Path) -> StudyRun:
    missing = [name for name in (*KEYS, "seed", "folder", "status") if name not in row]
    if missing:
        raise UserError(f"{path}: a run without {missing[0]!r}; run the study again to write the file anew")
    error = row.get("error")
    return StudyRun(
        *(row[name] for name in (*KEYS, "seed", "status")),
        error=str(error).strip().split("\n")[0] if error else None,
        evaluations=read_evaluations(folder / row["folder"]),
    )


def _details(folder: Path, runs: list[dict[str, Any]]) -> dict[tuple[str, str, str], Run]:
    """Only one run an arm is read whole: a study's metrics can be a hundred times what a report shows of them."""
    found: dict[tuple[str, str, str], Run] = {}
    for row in sorted(runs, key=lambda row: row["status"] != "finished"):
        key = tuple(row[name] for name in KEYS)
        if key not in found and RunFolder(folder / row["folder"]).metrics.exists():
            found[key] = read_run(folder / row["folder"])
    return found
