"""Estimates that can be made again from a checkpoint or a ledger. Next: `remembering.py`.

One idea: whatever wraps it, an estimate without a gradient is a sum of noise with coefficients, and that is a few numbers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.estimators.contract import Estimate, Restricted, WeightedSum, zeros_and
from hybrid_opt.estimators.probing import NoiseSum
from hybrid_opt.noise.keys import Key, StepKey
from hybrid_opt.perturbations.contract import Perturbation


@dataclass(frozen=True)
class Replay:
    """One sum of noise of a step, for the parameters that were perturbed then; zero for all others."""

    noise: NoiseSum
    names: frozenset[str]
    key: StepKey

    def read(self, shard: Shard) -> Tensor:
        """See `Estimate.read`."""
        return zeros_and(self, shard)

    def add_to(self, out: Tensor, shard: Shard, factor: float) -> None:
        """See `Estimate.add_to`."""
        if shard.name in self.names:
            self.noise.add_to(out, shard, factor)

    def state_dict(self) -> dict[str, Any]:
        """As plain values and a tensor."""
        return {
            "origin": list(self.key.origin),
            "keys": [key.text for key in self.noise.keys],
            "coefficients": self.noise.coefficients,
            "names": sorted(self.names),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], perturbation: Perturbation, engine: Engine) -> "Replay":
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
    """The sums of noise that an estimate for these parameters consists of, with factors and restrictions taken in.

    Args:
        key: of the step that drew the noise, where the estimate does not say it itself.
    """
    match estimate:
        case NoiseSum():
            return [Replay(_scaled(estimate, factor), names, key)]
        case Replay(noise, some, origin):
            return [Replay(_scaled(noise, factor), names & some, origin)]
        case Restricted(inner, some):
            return replays_of(inner, names & some, key, factor)
        case WeightedSum(terms):
            return [replay for weight, term in terms for replay in replays_of(term, names, key, factor * weight)]
    raise AssertionError(f"{type(estimate).__name__} is no sum of noise; its configuration's draws_noise is wrong")


def _scaled(noise: NoiseSum, factor: float) -> NoiseSum:
    return noise if factor == 1 else NoiseSum(noise.perturbation, noise.keys, noise.coefficients * factor)
