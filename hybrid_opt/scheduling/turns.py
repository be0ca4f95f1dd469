"""Turns: for how many steps each estimator has acted since it rested, and has rested since it acted. Next: `../training/updates.py`.

One idea: two counts an estimator are all that is remembered of who acted when. They are counts, not numbers of steps, so nothing changes
in them where weights are put back to earlier ones.
"""

from collections.abc import Collection, Iterable
from typing import Any


class Turns:
    """Counts for estimators by name."""

    def __init__(self, names: Iterable[str]) -> None:
        self.acted: dict[str, int | None] = dict.fromkeys(names)
        """Steps of the present turn, 0 for who rests; None: it has acted ever since the run's first step."""
        self.rested = dict.fromkeys(self.acted, 0)
        """Steps without the estimator since its latest update."""

    def warmth(self, name: str, steps: int) -> float:
        """What the learning rate of an estimator's next step is multiplied by: `min(1, (k + 1) / steps)`, k the steps of its turn so far."""
        k = self.acted[name]
        return 1.0 if k is None or not steps else min(1.0, (k + 1) / steps)

    def take(self, acting: Collection[str], updating: Collection[str]) -> None:
        """See a step.

        Args:
            acting: who acted.
            updating: those of them whose estimates said something, and were applied.
        """
        for name, k in self.acted.items():
            if name not in acting:
                self.acted[name], self.rested[name] = 0, self.rested[name] + 1
                continue
            self.acted[name] = None if k is None else k + 1
            if name in updating:
                self.rested[name] = 0

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"acted": dict(self.acted), "rested": dict(self.rested)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.acted, self.rested = dict(state["acted"]), dict(state["rested"])
