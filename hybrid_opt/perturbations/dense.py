"""Dense perturbation: every weight gets a noise value of its own. Next: `forward_size.py`.

One idea: members are evaluated one at a time with weights made for them, and the model's own weights stay what they are or
are put back from a copy, never by subtracting the noise again: 100 rounds of adding and subtracting change bfloat16
weights by 3.9 % (float32 by 6e-7).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_opt.engines.contract import Engine, Shard, is_spread
from hybrid_opt.errors import UserError
from hybrid_opt.noise.drawing import block_size
from hybrid_opt.noise.keys import Key, StepKey
from hybrid_opt.objectives.contract import Objective, select
from hybrid_opt.perturbations.contract import Member
from hybrid_opt.perturbations.directions import Directions, Independent
from hybrid_opt.perturbations.forward_size import ForwardSize, Piece, one_by_one
from hybrid_opt.perturbations.rehearsal import rehearse
from hybrid_opt.perturbations.swapping import while_running


class DensePerturbation:
    """`w + sign * sigma * eps`, eps from a source of directions: by default independent gaussian or rademacher values.

    Works for any module. Memory: a second copy of the weights of the module that is running. A weight that is used
    outside its module's forward is written in place for the whole of a member's evaluation and has a copy meanwhile.

    Args:
        directions: where eps comes from, or the name of a distribution of independent values.
        whole_model: write all weights in place and keep a copy of all; noise is then drawn once a member, not at every
            call of a module.
    """

    def __init__(
        self,
        directions: Directions | str,
        sigma: float,
        *,
        whole_model: bool = False,
        forward_size: ForwardSize | None = None,
    ) -> None:
        self.directions = Independent(directions) if isinstance(directions, str) else directions
        self.sigma = sigma
        self.scales: Mapping[str, float] = {}
        self.exceptions: Mapping[str, str] = {}  # there are none
        self.whole_model = whole_model
        self.forward_size = forward_size or ForwardSize()
        self._outside: dict[tuple[nn.Module, frozenset[str]], tuple[frozenset[str], int]] = {}

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """Every parameter of every module can be written."""

    def ready(self, engine: Engine, names: Collection[str], keys: Sequence[Key], key: StepKey) -> "DensePerturbation":
        """See `Perturbation.ready`."""
        result = copy(self)
        result.directions = self.directions.ready(engine, names, keys, key)
        return result

    def dimension(self, engine: Engine, names: Collection[str]) -> int:
        """See `Perturbation.dimension`."""
        return self.directions.dimension(engine, names)

    def evaluate(
        self,
        engine: Engine,
        objective: Objective,
        batch: Any,
        names: Collection[str],
        members: Sequence[Member],
        examples: Tensor | None,
    ) -> Tensor:
        """See `Perturbation.evaluate`: one forward pass a member and micro-batch."""
        parameters = {name: engine.parameters[name] for name in engine.parameters if name in names}
        outside, bytes_per_example = self._rehearsed(engine, objective, batch, parameters)

        def losses_of(piece: Piece) -> Tensor:
            part = batch if examples is None else select(batch, examples[piece.members.start, piece.examples])
            with self.perturbed(engine.model, parameters, members[piece.members.start], outside):
                return objective.losses(engine.model, part).float().view(1, -1)

        if examples is None:
            return one_by_one(losses_of, len(members))
        return self.forward_size.evaluate(losses_of, objective, batch, examples, 1, bytes_per_example, engine, most=1)

    @contextmanager
    def perturbed(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        member: Member,
        outside: Collection[str] = (),
    ) -> Iterator[None]:
        """Inside, the model computes with the member's weights.

        Args:
            outside: parameters that are written in place, because they are used outside their module's forward.
        """
        if not member.sign:
            yield
            return
        written = {name: p for name, p in parameters.items() if self.whole_model or name in outside}
        swapped = {name: p for name, p in parameters.items() if name not in written}
        with (
            _restored(written) as originals,
            while_running(model, swapped, lambda name: self._perturbed(parameters[name].data, member, name)),
        ):
            for name, original in originals.items():
                written[name].data.copy_(self._perturbed(original, member, name))
            yield

    def add_noise(self, keys: Sequence[Key], coefficients: Tensor, shard: Shard, out: Tensor) -> None:
        """See `Perturbation.add_noise`. Products and sums are taken one by one, so a slice equals that of the whole."""
        coefficients = coefficients / self.scales.get(shard.name, 1.0)
        block = block_size(out.device)
        for at in range(0, len(out), block):
            piece = out[at : at + block]
            total = torch.zeros_like(piece)
            directions = self.directions.read(keys, shard.name, shard.start + at, len(piece), out.device)
            for direction, coefficient in zip(directions, coefficients.tolist(), strict=True):
                total += direction.mul_(coefficient)
            piece += total

    def _perturbed(self, original: Tensor, member: Member, name: str) -> Tensor:
        """New weights for a member, made block by block, so that no second copy in float32 is needed."""
        result = torch.empty_like(original, memory_format=torch.contiguous_format)
        flat, source = result.view(-1), original.reshape(-1)
        scale = member.sign * self.sigma * self.scales.get(name, 1.0)
        block = block_size(original.device)
        for at in range(0, len(flat), block):
            noise = self.directions.read([member.key], name, at, min(block, len(flat) - at), original.device)[0]
            flat[at : at + block] = noise.mul_(scale).add_(source[at : at + block])
        return result

    def _rehearsed(
        self, engine: Engine, objective: Objective, batch: Any, parameters: Mapping[str, nn.Parameter]
    ) -> tuple[frozenset[str], int]:
        key = (engine.model, frozenset(parameters))
        if key not in self._outside:
            found = rehearse(engine, objective, batch, parameters)
            self._outside[key] = (found.outside, found.bytes_per_example)
        return self._outside[key]


@contextmanager
def _restored(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Copies of weights, put back at the end whatever happens."""
    for name, p in parameters.items():
        if is_spread(p):
            raise UserError(
                f"perturbation dense: parameter {name} would be written in place for the whole of a member's evaluation, because "
                "it is used outside its own module (or backup is 'model'), and ZeRO-3 spreads it over the ranks; write "
                "zero_stage: 2, exclude it from es by the policy, or backup: layer"
            )
    originals = {name: p.data.clone() for name, p in parameters.items()}
    try:
        yield originals
    finally:
        for name, original in originals.items():
            parameters[name].data.copy_(original)
