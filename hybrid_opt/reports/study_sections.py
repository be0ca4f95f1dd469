"""The report on a study. Next: `provenance.py`, then `html.py`.

One idea: arms are compared within a task and a budget, so every part of the report comes once for each pair of them.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hybrid_opt.reports import completions
from hybrid_opt.reports.ablation_table import ablation_table
from hybrid_opt.reports.content import Group, Report, Section
from hybrid_opt.reports.es_statistics import chosen_for, meaning_of, what_is_absent
from hybrid_opt.reports.keys import arm_keys
from hybrid_opt.reports.mean_curves import GRID, curves_group
from hybrid_opt.reports.memory_panels import memory_of_arms
from hybrid_opt.reports.pareto import pareto_group
from hybrid_opt.reports.provenance import provenance
from hybrid_opt.reports.records import Run, Study
from hybrid_opt.reports.statistic_panels import panels_of_arms
from hybrid_opt.reports.timeline import timeline_of_arms
from hybrid_opt.reports.update_norms import norms_panel

CURVES = (
    "Evaluation {goal}, mean over the seeds that finished; the band is the 95 % interval by Student's t, and a single seed has none. "
    "Where seeds were evaluated at different places, each is interpolated linearly onto {grid} common ones within the range that all of "
    "them have. A band may go on beyond the panel. Numbers are those of the arms in the table."
)
PARETO = "Filled: no other arm is as good in both and better in one. The dashed staircase is that front; bars are 95 % intervals, which may go on beyond the panel."
DETAILS = "One run of each arm, the first seed that finished. Of many steps a point stands for several: their mean, and for memory their most."
NO_DETAILS = "No run has recorded a step yet."
NOT_YET = "No finished run yet."


def report_of_study(study: Study) -> Report:
    """All sections of a study's report."""
    pairs = [(task, budget, f"g{i}") for i, (task, budget) in enumerate(study.groups)]
    tables = tuple(ablation_table(study, task, budget, f"arms_{name}") for task, budget, name in pairs)
    curves = _filled(curves_group(study, task, budget, f"loss_{name}") for task, budget, name in pairs)
    fronts = _filled(pareto_group(study, task, budget, f"pareto_{name}") for task, budget, name in pairs)
    goal = " or ".join(dict.fromkeys(study.goal_of(task, budget) for task, budget, _ in pairs)) or "loss"
    told = CURVES.format(goal=goal, grid=GRID) if curves else NOT_YET
    sections = (
        Section("arms", "Arms compared", tables=tables),
        Section("loss", f"{goal.capitalize()} along the way", (told,), groups=curves),
        Section("pareto", f"{goal.capitalize()} against cost", (PARETO if fronts else NOT_YET,), groups=fronts),
        *_details(study),
        provenance([run.machine for run in study.details.values()], study.config_text, "study.yaml"),
    )
    return Report("study", study.title, study.description, tuple(_facts(study)), study.remarks, sections)


def _filled(groups: Any) -> tuple[Group, ...]:
    return tuple(group for group in groups if group.panels)


def _facts(study: Study) -> Iterator[tuple[str, str]]:
    counts = Counter(run.status for run in study.runs)
    yield "runs", ", ".join(f"{counts[status]} {status}" for status in counts) or "none"
    for name in ("arms", "seeds", "tasks", "budgets"):
        values = getattr(study, name)
        yield name, str(len(values)) if name in ("arms", "seeds") else ", ".join(values)
    if study.reference:
        yield "reference", study.reference
    if study.metric:
        yield "metric", f"{study.metric} ({study.metric_better} is better)"


# ---------------------------------------------------------------- details


def _details(study: Study) -> Iterator[Section]:
    groups = {"who_acted": [], "update_norms": [], "es_statistics": [], "completions": [], "memory": []}
    for i, (task, budget) in enumerate(study.groups):
        runs = {arm: run for arm in study.arms if (run := study.details.get((task, budget, arm))) and run.steps}
        for part, group in _details_of(study, runs, f"g{i}", f"{task}, {budget}"):
            groups[part].append(group)
    absent = what_is_absent(study.details.values()) if study.details else ()
    for part, title, texts in (
        ("who_acted", "Who acted when", (DETAILS,)),
        (
            "update_norms",
            "Update norms",
            ("Root of the mean square over the steps in which the estimator moved a layer.",),
        ),
        ("es_statistics", "ES statistics", (*absent, meaning_of(study.details.values()))),
        ("completions", "Completions", (completions.MEANING,)),
        ("memory", "Memory over time", ()),
    ):
        found = tuple(groups[part])
        if part == "completions" and not found:
            continue  # of no interest where nothing is written
        yield Section(
            part,
            title,
            texts if found else (*absent,) * (part == "es_statistics") or (NO_DETAILS,),
            groups=found,
            detail=True,
        )


def _details_of(study: Study, runs: dict[str, Run], name: str, title: str) -> Iterator[tuple[str, Group]]:
    """Part and group of panels, for what there is."""
    if not runs:
        return
    keys = {arm: key for arm, key in arm_keys(study.arms, study.reference).items() if arm in runs}
    timeline = timeline_of_arms(runs, study.reference, study.arms, f"timeline_{name}")
    yield "who_acted", Group(title, (timeline,), tuple(replace(key, dash="") for key in keys.values()))
    norms = [
        panel
        for arm, run in runs.items()
        if (panel := norms_panel(run, f"norms_{name}_{keys[arm].number}", f"{keys[arm].number}. {arm}"))
    ]
    if norms:
        movers = {series.key for panel in norms for series in panel.series}
        legend = tuple(sorted(movers, key=lambda key: key.colour))
        yield "update_norms", Group(title, tuple(norms), legend)
    recorded = (("es_statistics", "es", chosen_for), ("completions", "written", completions.completions_of))
    for part, prefix, chosen in recorded:
        if panels := panels_of_arms(runs, keys, f"{prefix}_{name}", chosen(runs.values())):
            shown = {series.key for panel in panels for series in panel.series}
            yield part, Group(title, panels, tuple(key for key in keys.values() if key in shown))
    if memory := memory_of_arms(runs, keys, f"memory_{name}"):
        yield "memory", Group(title, (memory,), tuple(series.key for series in memory.series))
