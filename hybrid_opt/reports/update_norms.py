"""Panels of how far each layer moved in a step, by who moved it. Next: `es_statistics.py`.

One idea: a layer's norm is the root of the mean square over the steps in which that estimator moved it, so that estimators which act
in few steps can be compared with those that act in many.
"""

import math
import re
from typing import Any

from hybrid_opt.reports.content import Plot, Series
from hybrid_opt.reports.keys import actor_keys
from hybrid_opt.reports.records import Run

EMBEDDING = re.compile(r"emb|wte|wpe", re.IGNORECASE)


def norms_by_layer(run: Run) -> dict[str, dict[str, float]]:
    """Root mean square of each layer's update norm, by who moved it and layer."""
    squares: dict[str, dict[str, list[float]]] = {}
    for step in run.steps:
        for who, layers in (step.update_norms or {}).items():
            for layer, norm in layers.items():
                squares.setdefault(who.replace("+", " + "), {}).setdefault(layer, []).append(norm * norm)
    return {
        who: {layer: math.sqrt(math.fsum(values) / len(values)) for layer, values in layers.items()}
        for who, layers in squares.items()
    }


def in_depth_order(layers: Any) -> list[str]:
    """Embeddings, then the numbered layers by number, then the rest."""

    def place(layer: str) -> tuple[int, int, str]:
        if layer.isdigit():
            return 1, int(layer), layer
        return (0 if EMBEDDING.search(layer) else 2), 0, layer

    return sorted(set(layers), key=place)


def norms_panel(run: Run, name: str = "update_norms", title: str = "Update norm by layer") -> Plot | None:
    """Layers from top to bottom; None if no norm was recorded."""
    norms = norms_by_layer(run)
    layers = in_depth_order(layer for by_layer in norms.values() for layer in by_layer)
    if not layers:
        return None
    keys = actor_keys(norms)
    series = []
    for who, key in keys.items():
        rows = [(norms[who][layer], float(i)) for i, layer in enumerate(layers) if norms[who].get(layer, 0) > 0]
        if rows:
            series.append(Series(key, *(tuple(values) for values in zip(*rows, strict=True))))
    return Plot(name, title, "norm of a step's change", "layer", tuple(series), tuple(layers), log=True)
