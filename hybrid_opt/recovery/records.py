"""Records: what must be kept of a step without a gradient to take it again without evaluating anything. Next: `ledger.py`.

One idea: such a step moves weights along sums of noise, so a few keys, coefficients and learning rates are all of it. What is applied is
what is recorded, down to the last bit: coefficients are rounded to float32 before, not after.
"""

import base64
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from typing_extensions import Self

from hybrid_opt.engines.contract import Engine, whole_shape
from hybrid_opt.engines.inspection import weights_digest
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.contract import Estimate, Estimator, WeightedSum, innermost, prepared
from hybrid_opt.estimators.probing import NoiseSum
from hybrid_opt.estimators.replay import Replay, replays_of
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.recovery.documents import PartOfStep, RecordedStep


@dataclass(frozen=True)
class Part:
    """One estimator's part in a step."""

    estimator: str
    """Its name in the schedule."""
    weight: float
    """Factor of its estimate, from the schedule."""
    learning_rate: float
    names: Sequence[str]
    """Parameters that it may move."""
    sums: Sequence[Replay]
    """What its estimate is the sum of."""
    rested: int = 0
    """Steps of a rest that the memory of its update rule is told of before."""

    @classmethod
    def of(
        cls,
        name: str,
        estimate: Estimate,
        weight: float,
        learning_rate: float,
        names: Sequence[str],
        key: StepKey,
        rested: int = 0,
    ) -> Self:
        """The part of an estimate that is made of noise, its coefficients rounded to float32."""
        sums = [_rounded(replay) for replay in replays_of(estimate, frozenset(names), key)]
        return cls(name, weight, learning_rate, names, sums, rested)

    @property
    def estimate(self) -> WeightedSum:
        """The estimate, to be applied."""
        return WeightedSum([(1.0, replay) for replay in self.sums])


@dataclass(frozen=True)
class Record:
    """A step of estimators that draw noise; without parts if nothing was learned from it."""

    step: int
    policy: str
    """Digest of the policy of the step's phase."""
    parts: Sequence[Part]

    def document(self, engine: Engine) -> dict[str, Any]:
        """The record in plain values, as `RecordedStep` describes them."""
        places = {name: i for i, name in enumerate(engine.parameters)}
        return {"step": self.step, "policy": self.policy, "parts": [_plain_part(part, places) for part in self.parts]}

    @classmethod
    def restored(
        cls, document: Mapping[str, Any], estimators: Mapping[str, Estimator], engine: Engine, seed: int
    ) -> Self:
        """The record that gave a document, its noise made ready at the present weights, which must be those that it was taken at.

        All ranks together. What estimators decide from the weights before they evaluate (masks, scales) is decided anew.

        Raises:
            UserError: the document is not as it must be, or names estimators or parameters that there are not.
        """
        try:
            recorded = RecordedStep.model_validate(document)
            names = list(engine.parameters)
            parts = [
                _restored_part(
                    part, estimators[part.estimator], engine, names, StepKey(seed, recorded.step, part.estimator)
                )
                for part in recorded.parts
            ]
        except (ValidationError, KeyError, IndexError, AttributeError) as error:
            problem = " ".join(str(error).split())[:200]
            raise UserError(f"step {document.get('step')} of the ledger does not suit this run: {problem}") from None
        return cls(recorded.step, recorded.policy, parts)


def digest_of(owners: Mapping[str, Collection[str]]) -> str:
    """8 hexadecimal digits for a policy that was resolved against a model."""
    return hashlib.blake2b(json.dumps([[k, list(v)] for k, v in owners.items()]).encode(), digest_size=4).hexdigest()


def description_of(engine: Engine, start_is_known: bool = True) -> dict[str, Any]:
    """What must be the same of a model to take recorded steps with it: its parameters, for which records have places, and its weights,
    as far as this rank has them (none if nobody can say what they are at the start)."""
    described = [[name, list(whole_shape(p))] for name, p in engine.parameters.items()]
    parameters = hashlib.blake2b(json.dumps(described).encode(), digest_size=8).hexdigest()
    if engine.ranks.rank or not start_is_known:  # a ledger tells of rank 0's weights
        return {"parameters": parameters, "layout": None, "weights": None}
    return {"parameters": parameters, "layout": engine.layout(), "weights": weights_digest(engine)}


def _rounded(replay: Replay) -> Replay:
    noise = replay.noise
    coefficients = noise.coefficients.cpu().float().double()
    return Replay(NoiseSum(noise.perturbation, noise.keys, coefficients), replay.names, replay.key)


def _plain_part(part: Part, places: Mapping[str, int]) -> dict[str, Any]:
    sums = [_plain_sum(replay, part, places) for replay in part.sums]
    return {
        "estimator": part.estimator,
        "weight": part.weight,
        "learning_rate": part.learning_rate,
        **({"rested": part.rested} if part.rested else {}),
        "parameters": list(_runs(places[name] for name in part.names)),
        "sums": sums,
    }


def _plain_sum(replay: Replay, part: Part, places: Mapping[str, int]) -> dict[str, Any]:
    noise = replay.noise
    plain = {
        "origin": list(replay.key.origin),
        "keys": [_relative(key.text, replay.key.text) for key in noise.keys],
        "coefficients": base64.b64encode(noise.coefficients.numpy().astype("<f4").tobytes()).decode(),
    }
    if replay.names != frozenset(part.names):
        plain["parameters"] = list(_runs(sorted(places[name] for name in replay.names)))
    exceptions = {name: form for name, form in noise.perturbation.exceptions.items() if name in replay.names}
    return plain | ({"exceptions": exceptions} if exceptions else {})


def _restored_part(part: PartOfStep, estimator: Estimator, engine: Engine, names: Sequence[str], key: StepKey) -> Part:
    own = _names(part.parameters, names)
    prepared(estimator, engine, own, key)
    perturbation = innermost(estimator).perturbation
    sums = []
    for plain in part.sums:
        perturbation.exceptions = plain.exceptions
        state = {
            "origin": plain.origin,
            "keys": [_absolute(text, StepKey(*plain.origin).text) for text in plain.keys],
            "coefficients": torch.from_numpy(np.frombuffer(plain.coefficients, dtype="<f4").astype(np.float64)),
            "names": _names(plain.parameters or part.parameters, names),
        }
        sums.append(Replay.from_state(state, perturbation, engine))
    return Part(part.estimator, part.weight, part.learning_rate, own, sums, part.rested)


def _relative(text: str, origin: str) -> str:
    """A key's text without that of its step's key; like a path it begins with / where it does not lie below it."""
    return text.removeprefix(origin) if text.startswith(origin) else f"/{text}"


def _absolute(text: str, origin: str) -> str:
    return text[1:] if text.startswith("/") else origin + text


def _runs(numbers: Iterator[int]) -> Iterator[list[int]]:
    """Numbers that follow each other, as `[first, end]`; the numbers rise."""
    run: list[int] = []
    for number in numbers:
        if run and number == run[1]:
            run[1] += 1
        else:
            if run:
                yield run
            run = [number, number + 1]
    if run:
        yield run


def _names(runs: Sequence[Sequence[int]], names: Sequence[str]) -> list[str]:
    return [names[i] for first, end in runs for i in range(first, end)]
