"""The picture of a run: loss against steps and against seconds, coloured by who acted. Next: nothing; this is the end."""

from itertools import compress
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw_curves(metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]], path: Path) -> None:
    """Write the picture.

    Args:
        metrics: lines of `metrics.jsonl`; steps without a loss leave no mark.
        evaluations: lines of `evaluations.jsonl`.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    seconds, total = [], 0.0
    for row in metrics:
        total += row["seconds"]
        seconds.append(total)
    evaluated = [row["loss"] is not None for row in metrics]
    rows = list(compress(metrics, evaluated))
    actors = list(dict.fromkeys(_who(row) for row in rows))
    for ax, unit, xs in zip(axes, ("step", "seconds"), ([row["step"] + 1 for row in metrics], seconds), strict=True):
        marked = list(compress(xs, evaluated))
        ax.plot(marked, [row["loss"] for row in rows], color="0.85", linewidth=1, zorder=1)
        for number, actor in enumerate(actors):
            points = [(x, row["loss"]) for x, row in zip(marked, rows, strict=True) if _who(row) == actor]
            ax.scatter(*zip(*points, strict=True), s=16, color=f"C{number}", label=f"training, {actor}", zorder=2)
        if evaluations:
            # An evaluation of step s was made after s steps, so it lies at the end of the step before.
            at = [0.0 if row["step"] == 0 else xs[row["step"] - 1] for row in evaluations if row["step"] <= len(xs)]
            losses = [row["loss"] for row in evaluations if row["step"] <= len(xs)]
            ax.plot(at, losses, color="black", marker="D", markersize=4, linewidth=1.2, label="validation", zorder=3)
        ax.set_xlabel(unit)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("loss")
    if rows or evaluations:
        axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=130)


def _who(row: dict[str, Any]) -> str:
    return " + ".join(row["estimators"])
