"""Estimates that can be made again from a checkpoint. Next: `remembering.py`.

One idea: whatever wraps it, an estimate without a gradient is a sum of noise with coefficients, and that is a few numbers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hybrid_opt.engines.contract import Engine
from hybrid_opt.estimators.contract import Estimate, Restricted, WeightedSum
from hybrid_opt.estimators.probing import NoiseSum
from hybrid_opt.noise.keys import Key, StepKey
from hybrid_opt.perturbations.contract import Perturbation


@dataclass(frozen=True)
class Replay:
    """One sum of noise of a step, for the parameters that were perturbed then."""

    noise: NoiseSum
    names: frozenset[str]
    key: StepKey

    @property
    def estimate(self) -> Estimate:
        """The sum, zero for all other parameters."""
        return Restricted(self.noise, self.names)

    def state_dict(self) -> dict[str, Any]:
        """As plain values and a tensor."""
        return {
            "origin": list(self.key.origin),
            "keys": [key.text for key in self.noise.keys],
            "coefficients": self.noise.coefficients,
            "names": sorted(self.names),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], perturbation: Perturbation, engine: Engine) -> "Replay":
        """What `state_dict` gave, its directions made ready by the estimator's perturbation; all ranks together."""
        keys, names = [Key.from_text(text) for text in state["keys"]], frozenset(state["names"])
        key = StepKey(*state["origin"])
        in_order = [name for name in engine.parameters if name in names]
        return cls(NoiseSum(perturbation.ready(engine, in_order, keys, key), keys, state["coefficients"]), names, key)


def replays_state(steps: Iterable[Sequence[Replay]]) -> dict[str, Any]:
    """The sums of several steps as checkpoints take them: by number of the step, then of the sum."""
    return {str(i): {str(j): replay.state_dict() for j, replay in enumerate(step)} for i, step in enumerate(steps)}


def restored_replays(state: Mapping[str, Any], perturbation: Perturbation, engine: Engine) -> list[list[Replay]]:
    """What `replays_state` was given; all ranks together."""
    steps = [[step[str(j)] for j in range(len(step))] for step in (state[str(i)] for i in range(len(state)))]
    return [[Replay.from_state(kept, perturbation, engine) for kept in step] for step in steps]


def replays_of(estimate: Estimate, names: frozenset[str], key: StepKey, factor: float = 1.0) -> list[Replay]:
    """The sums of noise that an estimate for these parameters consists of, with factors and restrictions taken in."""
    match estimate:
        case NoiseSum(perturbation, keys, coefficients):
            return [Replay(NoiseSum(perturbation, keys, _scaled(coefficients, factor)), names, key)]
        case Restricted(inner, some):
            return replays_of(inner, names & some, key, factor)
        case WeightedSum(terms):
            return [replay for weight, term in terms for replay in replays_of(term, names, key, factor * weight)]
    raise AssertionError(
        f"{type(estimate).__name__} is no sum of noise; its configuration's directions_from_keys is wrong"
    )


def _scaled(coefficients: Tensor, factor: float) -> Tensor:
    return coefficients if factor == 1 else coefficients * factor
