"""Run and study folders with known numbers, written by hand, for tests of reports."""

import copy
import csv
import json
import math
from pathlib import Path

import yaml

from hybrid_opt.studies.results import SUMMARY_COLUMNS, summarise

LAYERS = ("embed_tokens", *map(str, range(4)), "norm")
MACHINE = {
    "hybrid_opt": "0.1.0",
    "python": "3.11.7",
    "platform": "Linux-6.1",
    "processor": "AMD EPYC",
    "cores": 2,
    "memory_bytes": 16_000_000_000,
    "device": "cpu",
    "ranks": 1,
    "packages": {"torch": "2.13.0+cpu", "transformers": "5.23.0"},
    "started": "2026-11-25T20:13:29+00:00",
}
NEW_KEYS = ("forward_equivalents", "update_norms")


def jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def step(number: int, actors: tuple[str, ...], level: float = 1.6, layers=LAYERS) -> dict:
    """The line of a step: ES takes 8 forward passes and 2 s, backprop one of each and 1 s; both see 100 tokens a pass."""
    loss = level / (1 + number / 8) + 0.05 * math.sin(7 * number)
    parts = {name: part(name, number, len(actors) > 1) for name in actors}
    who = "+".join(actors)
    scale = {"es": 1e-3, "backprop": 1e-2}.get(who, 2e-2)
    return {
        "step": number,
        "estimators": list(actors),
        "weights": {name: 1.0 if name == "backprop" else 0.5 for name in actors},
        "loss": loss,
        "losses": dict.fromkeys(actors, loss),
        "loss_spread": 0.01,
        "learning_rates": dict.fromkeys(actors, 1e-4),
        **{cost: sum(p[cost] for p in parts.values()) for cost in ("forwards", "backwards", "forward_equivalents", "tokens", "seconds")},
        "peak_memory_bytes": 3_000_000_000 if "backprop" in actors else 1_000_000_000,
        "parts": parts,
        "update_norms": {who: {layer: scale * (1 + i) for i, layer in enumerate(layers)}},
    }  # fmt: skip


def part(name: str, number: int, together: bool) -> dict:
    forwards = 8 if name == "es" else 1
    statistics = {"snr": 3.0 + math.sin(number), "gradient_norm": 2.0} if name == "es" else {}
    if name == "es" and together:
        statistics |= {"cosine": 0.02, "rho2": 0.0004}
    backwards = 0 if name == "es" else 1
    return {
        "forwards": forwards,
        "backwards": backwards,
        "forward_equivalents": forwards + 2.0 * backwards,
        "tokens": 100 * forwards,
        "seconds": 2.0 if name == "es" else 1.0,
        "statistics": statistics,
    }


def turns(number: int) -> tuple[str, ...]:
    """Two ES steps, one of backprop, and one of both."""
    return (("es",), ("es",), ("backprop",), ("es", "backprop"))[number % 4]


def write_run(
    folder: Path, steps: int = 16, who=turns, level: float = 1.6, evaluate_every: int = 4, layers=LAYERS
) -> Path:
    """A finished run of the current version."""
    folder.mkdir(parents=True)
    rows = [step(number, who(number), level, layers) for number in range(steps)]
    jsonl(folder / "metrics.jsonl", rows)
    evaluations = [evaluation(rows[:done], level) for done in range(0, steps + 1, evaluate_every)]
    jsonl(folder / "evaluations.jsonl", evaluations)
    measures = [{name: row[name] for name in ("loss", "accuracy")} for row in (evaluations[0], evaluations[-1])]
    summary = {
        "steps": steps,
        "before": measures[0],
        "after": measures[1],
        "estimators": {"es": {"loss_decrease": 0.71}, "backprop": {"loss_decrease": 0.85}},
        "shared_loss_decrease": {"es+backprop": 0.1},
        "seconds": sum(row["seconds"] for row in rows),
        "peak_memory_bytes": 3_000_000_000,
        "finished": True,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "machine.json").write_text(json.dumps(MACHINE))
    config = {
        "model": {"name": "smollm2-135m"},
        "data": {"prompt": "{subject}"},
        "training": {"steps": steps, "batch_size": 8},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def evaluation(rows: list[dict], level: float) -> dict:
    totals = {name: sum(row[name] for row in rows) for name in ("seconds", "tokens", "forward_equivalents")}
    return {
        "step": len(rows),
        "loss": level / (1 + len(rows) / 8),
        "accuracy": 1 - 0.3 * level / (1 + len(rows) / 8),
        **totals,
    }


def age(folder: Path) -> None:
    """Take away from a run what older versions did not write."""
    (folder / "machine.json").unlink()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for row in rows:
            for key in NEW_KEYS:
                row.pop(key, None)
            for part in row.get("parts", {}).values():
                part.pop("forward_equivalents")
                part.pop("statistics")
        jsonl(folder / name, rows)


def reward(folder: Path) -> Path:
    """Make a run's accuracy its reward, and what backprop minimises an objective of its own."""
    for path, change in (("metrics.jsonl", _rewarded_step), ("evaluations.jsonl", _rewarded)):
        rows = [json.loads(line) for line in (folder / path).read_text().splitlines()]
        jsonl(folder / path, [change(row) for row in rows])
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"goal": "reward", **{when: _rewarded(summary[when]) for when in ("before", "after")}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _rewarded(measures: dict) -> dict:
    return {**measures, "loss": -measures["accuracy"], "reward": measures["accuracy"], "finished": 0.5}


def _rewarded_step(row: dict) -> dict:
    parts = copy.deepcopy(row["parts"])
    if "backprop" in parts:
        parts["backprop"]["own_objective"] = True
    own = {
        "reward": 0.25,
        "skipped": 0,
        "tied_pairs": 2,
        "completion_tokens": 7.5,
        "finished": 0.5,
        "reward_errors": 0.0,
    }
    parts.get("es", {"statistics": {}})["statistics"].update(own)
    acts = "es" in parts
    losses = {name: -0.25 if name == "es" else loss for name, loss in row["losses"].items()}
    return {**row, "loss": -0.25 if acts else None, "reward": 0.25 if acts else None, "losses": losses, "parts": parts}


# ---------------------------------------------------------------- a study

ARMS = ("backprop", "es 0.5", "blend", "alternate")
ACTORS = {"backprop": lambda n: ("backprop",), "es 0.5": lambda n: ("es",), "blend": lambda n: ("es", "backprop")}


def write_study(
    folder: Path, arms=ARMS, seeds=(0, 1, 2), tasks=("spam",), budgets=("60 seconds",), status=lambda arm, seed: "finished", steps=16, layers=LAYERS,
    change=lambda run: run,
) -> Path:  # fmt: skip
    """A study whose first arm is the reference. The last arm differs from it by chance only, the others are worse.

    Args:
        change: what is done to each run (`reward`).
    """
    folder.mkdir(parents=True)
    runs, results = [], []
    cells = ((t, b, a, s) for t in tasks for b in budgets for a in arms for s in seeds)
    for task, budget, arm, seed in cells:
        state = status(arm, seed)
        place = f"runs/{task}/{budget}/{arm}/seed-{seed}".replace(" ", "-")
        error = "MemoryError: out of memory <b>now</b>" if state == "failed" else None
        runs.append(
            {"task": task, "budget": budget, "arm": arm, "seed": seed, "folder": place, "status": state, "error": error}
        )
        if state == "waiting":
            continue
        level = 1.6 + 0.1 * place_of(arms, arm) + 0.02 * seed * (1 + arms.index(arm) % 3)
        change(write_run(folder / place, steps, ACTORS.get(arm, turns), level, layers=layers))
        if state == "finished":
            results.append(result(task, budget, arm, seed, level, folder / place))
    index = {
        "title": "es_vs_gradient",
        "description": "Does ES pay?",
        "reference": arms[0],
        "metric": "accuracy",
        "metric_better": "higher",
        "tasks": tasks,
        "budgets": budgets,
        "arms": arms,
        "seeds": seeds,
        "runs": runs,
    }
    (folder / "study.json").write_text(json.dumps(index))
    (folder / "study.yaml").write_text(yaml.safe_dump({"description": "Does ES pay?", "arms": list(arms)}))
    if results:
        write_csv(folder / "results.csv", results)
        write_csv(folder / "summary.csv", summary_rows(index, results))
    return folder


def place_of(arms, arm: str) -> float:
    return 0.2 if arm == arms[-1] else arms.index(arm)


def result(task: str, budget: str, arm: str, seed: int, level: float, run: Path) -> dict:
    summary, rows = json.loads((run / "summary.json").read_text()), (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in rows]
    costs = {name: sum(row[name] for row in rows) for name in COSTS[1:-1]}
    costs |= {"steps": len(rows), "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows)}
    after, before = summary["after"], summary["before"]
    known = {"task": task, "budget": budget, "arm": arm, "seed": seed}
    measures = {
        f"{name}{when}": values.get("accuracy" if name == "metric" else name)
        for when, values in (("", after), ("_before", before))
        for name in ("loss", "reward", "metric")
    }
    counts = {"skipped": seed if "reward" in after else 0, "reward_errors": 0}
    return {**known, **measures, **costs, **counts, "learning_rate_factor": 1.0, "fitted": ""}


COSTS = ("steps", "seconds", "forwards", "backwards", "forward_equivalents", "tokens", "peak_memory_bytes")


def summary_rows(index: dict, results: list[dict]) -> list[dict]:
    """As `ablate` makes them; tests compare reports with the file."""
    cells = [(task, budget, arm) for task in index["tasks"] for budget in index["budgets"] for arm in index["arms"]]
    rows = summarise(results, cells, index["reference"])
    return [{name: {"failed": 0, **row}[name] for name in SUMMARY_COLUMNS} for row in rows]


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
