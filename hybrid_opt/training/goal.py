"""What the numbers of a run are of: a loss or a reward, the run's objective or an estimator's own. Next: `../display/progress.py`.

One idea: everything is minimised, and people are shown what they asked for; a loss that is a reward's negative is shown as the reward.
"""

from collections.abc import Mapping
from typing import Any


def goal_of(row: Mapping[str, Any]) -> str:
    """What the run's objective is called, by a line of `metrics.jsonl`: `reward` where it is one, whose negative is the loss."""
    return "reward" if "reward" in row else "loss"


def shown(measures: Mapping[str, float]) -> dict[str, float]:
    """The measures without a loss that only says the reward again, with the other sign."""
    again = "reward" in measures and measures.get("loss") == -measures["reward"]
    return {name: value for name, value in measures.items() if name != "loss" or not again}


def own_losses(row: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """What estimators with an objective of their own made of it in a step: by estimator `reward` or `loss`, and its value."""
    found = {}
    for name, part in (row.get("parts") or {}).items():
        if part.get("own_objective") and row["losses"][name] is not None:
            reward = part["statistics"].get("reward")
            found[name] = ("loss", row["losses"][name]) if reward is None else ("reward", reward)
    return found
