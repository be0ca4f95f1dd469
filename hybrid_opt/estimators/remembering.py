"""What estimators remember from step to step, for checkpoints. Next: `../training/hybrid_optimizer.py`.

One idea: an estimator may consist of several, one within the other, and each part that remembers something has a place of its own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from hybrid_opt.engines.contract import Engine
from hybrid_opt.estimators.contract import Estimator, Remembers, chain


def memories(estimators: Mapping[str, Estimator]) -> dict[str, Any]:
    """What each part of each estimator remembers on this rank, by name and number."""
    return {place: part.state_dict() for place, part in _remembering(estimators)}


def recall(estimators: Mapping[str, Estimator], state: Mapping[str, Any], engine: Engine) -> None:
    """Put back what `memories` gave."""
    for place, part in _remembering(estimators):
        part.load_state_dict(state[place], engine)


def _remembering(estimators: Mapping[str, Estimator]) -> Iterator[tuple[str, Remembers]]:
    for name, estimator in estimators.items():
        for number, part in enumerate(chain(estimator)):
            if isinstance(part, Remembers):
                yield f"{name}.{number}", part
