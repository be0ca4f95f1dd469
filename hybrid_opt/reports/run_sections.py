"""The report on one run. Next: `study_sections.py`.

One idea: a section stands in every report, and says in a sentence why it is empty where it is.
"""

from collections.abc import Iterator
from typing import Any

from hybrid_opt.reports.columns import AMOUNTS, SECONDS, STEPS
from hybrid_opt.reports.completions import MEANING, completions_of, errors_of
from hybrid_opt.reports.content import Column, Group, Report, Section, Table
from hybrid_opt.reports.decisions import decision_sections
from hybrid_opt.reports.es_statistics import chosen_for, meaning_of, what_is_absent
from hybrid_opt.reports.keys import actor_keys
from hybrid_opt.reports.loss_panels import loss_group, own_group
from hybrid_opt.reports.memory_panels import memory_group
from hybrid_opt.reports.provenance import provenance
from hybrid_opt.reports.records import Run
from hybrid_opt.reports.statistic_panels import Chosen, panels_of_run
from hybrid_opt.reports.thinning import bin_size, thinning_note
from hybrid_opt.reports.timeline import timeline_of_run
from hybrid_opt.reports.update_norms import norms_panel
from hybrid_opt.reports.wording import count, duration, known, measure, signed, size
from hybrid_opt.run_files.summary import counts_of, told_counts
from hybrid_opt.training.goal import shown

SHARES = (Column("estimator", "estimator", numeric=False), STEPS, *AMOUNTS, SECONDS)
GAINS = {
    "loss": (
        "loss decrease",
        "Loss decrease: fall of the loss on fixed held-out rows over the turns in which it acted alone.",
    ),
    "reward": (
        "reward gain",
        "Reward gain: rise of the reward on fixed held-out rows over the turns in which it acted alone, whatever it minimised itself.",
    ),
}
"""Heading and note of what an estimator gave."""
TITLES = {"finished": "completions that ended"}
"""Of measures whose names say too little."""
NO_STEPS = "No step has been recorded yet."
NORMS = "The Euclidean norm of a step's change to each layer: the root of the mean square over the steps in which the estimator moved it."


def report_of_run(run: Run) -> Report:
    """All sections of a run's report."""
    sections = (
        Section("outcome", "Outcome", tables=tuple(_tables(run)), texts=() if run.steps else (NO_STEPS,)),
        _loss(run),
        _drawn("who_acted", "Who acted when", timeline_of_run(run) if run.steps else None),
        *decision_sections(run),
        _norms(run),
        _statistics(run),
        *_completions(run),
        _drawn("memory", "Memory over time", memory_group(run), absent="No peak memory was recorded."),
        provenance([run.machine], run.config_text, "run.yaml"),
    )
    return Report("run", run.title, "", tuple(_facts(run)), run.remarks, sections)


def _drawn(name: str, title: str, *groups: Group | None, absent: str = NO_STEPS) -> Section:
    drawn = tuple(group for group in groups if group)
    return Section(name, title, groups=drawn) if drawn else Section(name, title, (absent,))


def _loss(run: Run) -> Section:
    groups = (loss_group(run), own_group(run)) if run.steps else ()
    return _drawn("loss", f"{run.goal.capitalize()} along the way", *groups)


def _norms(run: Run) -> Section:
    panel = norms_panel(run)
    absent = "No update norms were recorded: this version's runs have them in metrics.jsonl."
    legend = tuple(series.key for series in panel.series) if panel else ()
    return _drawn("update_norms", "Update norms", Group("", (panel,), legend, NORMS) if panel else None, absent=absent)


def _statistics(run: Run) -> Section:
    group = _panels(run, chosen_for([run]), meaning_of([run]))
    return Section("es_statistics", "ES statistics", what_is_absent([run]), groups=(group,) * bool(group.panels))


def _completions(run: Run) -> Iterator[Section]:
    """Nothing for a run without rewards."""
    if chosen := completions_of([run]):
        errors = errors_of(run)
        told = (
            f"Rewards that went wrong in training: {count(errors)}." if errors else "No reward went wrong in training."
        )
        yield Section("completions", "Completions", (told,), groups=(_panels(run, chosen, MEANING),))


def _panels(run: Run, chosen: Chosen, meaning: str) -> Group:
    panels = panels_of_run(run, chosen)
    legend = tuple({series.key: None for panel in panels for series in panel.series})
    return Group("", panels, legend, meaning + thinning_note(bin_size(len(run.steps))))


# ---------------------------------------------------------------- outcome


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    yield "status", "finished" if run.summary.get("finished") else "under way or interrupted"
    asked = (run.config.get("training") or {}).get("steps")
    taken = run.summary.get("steps", len(run.steps))
    yield "steps", f"{count(taken)} of {count(asked)}" if asked and asked != taken else count(taken)
    if back := run.summary.get("roll_backs"):
        yield "roll backs", count(back)
    seconds = [step.seconds for step in run.steps]
    yield "time of training", duration(sum(seconds))
    before, after = _before_and_after(run)
    for name in shown(before):
        yield (
            TITLES.get(name, name),
            " \u2192 ".join(measure(values[name]) for values in (before, after) if known(values.get(name))),
        )
    peaks = [step.peak_memory_bytes for step in run.steps if known(step.peak_memory_bytes)]
    if peaks:
        yield "peak memory", size(max(peaks))
    model = (run.config.get("model") or {}).get("name")
    if model:
        yield "model", str(model)
    if run.machine.get("device"):
        yield "device", str(run.machine["device"])


def _before_and_after(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measures before the first step, and after the last one that was evaluated."""
    if run.summary:
        return run.summary.get("before") or {}, run.summary.get("after") or {}
    rows = [row.measures for row in run.evaluations]
    return (rows[0], rows[-1] if len(rows) > 1 else {}) if rows else ({}, {})


def _tables(run: Run) -> Iterator[Table]:
    rows = [_share(run, name) for name in actor_keys(name for step in run.steps for name in step.parts)]
    for who, decrease in (run.summary.get("shared_loss_decrease") or {}).items():
        rows.append({"estimator": f"{who.replace('+', ' + ')}, together", "loss_decrease": decrease})
    if rows:
        title, note = GAINS[run.goal]
        decreases = any(known(row.get("loss_decrease")) for row in rows)
        columns = (*SHARES, Column("loss_decrease", title, signed))
        notes = ((note,) * decreases) + tuple(_counted(run, [row["estimator"] for row in rows]))
        yield Table("estimators", "What each estimator took and gave", columns, tuple(rows), notes)
    before, after = _before_and_after(run)
    if before:
        columns = (
            Column("measure", "measure", numeric=False),
            Column("before", "before", measure),
            Column("after", "after", measure),
        )
        rows = tuple(
            {"measure": TITLES.get(name, name), "before": value, "after": after.get(name)}
            for name, value in shown(before).items()
        )
        yield Table("measures", "On held-out rows", columns, rows)


def _counted(run: Run, names: list[str]) -> Iterator[str]:
    """A note for each estimator of whose estimates something was counted."""
    for name in names:
        parts = [step.parts[name] for step in run.steps if name in step.parts]
        if told := told_counts(len(parts), counts_of(parts)):
            yield f"{name}: {told}."


def _share(run: Run, name: str) -> dict[str, Any]:
    """Costs from the steps, so that an unfinished run has them too; the loss decrease from the summary."""
    parts = [step.parts[name] for step in run.steps if name in step.parts]
    costs = {}
    for cost in ("forwards", "backwards", "forward_equivalents", "tokens", "seconds"):
        values = [part.get(cost) for part in parts]
        costs[cost] = sum(values) if all(map(known, values)) else None
    decrease = ((run.summary.get("estimators") or {}).get(name) or {}).get("loss_decrease")
    return {"estimator": name, "steps": len(parts), **costs, "loss_decrease": decrease}
