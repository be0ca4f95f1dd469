"""Low rank perturbation: many members share one forward pass, and weights are never written. Next: `es.py`.

One idea: a matrix's noise is `E = B^T A / sqrt(r)` with B (r, m) and A (r, n) standard normal, so a layer's output for a
perturbed matrix is its plain output plus two thin products, which can differ from row to row of a batch.
Source: EGGROLL (arXiv 2511.16652).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_opt.engines.contract import Engine, Shard
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.dense import DensePerturbation
from hybrid_opt.estimators.forward_size import ForwardSize, Piece
from hybrid_opt.estimators.member_hooks import Factors, perturbed_members, refusal, why_not
from hybrid_opt.estimators.noise import Key, gaussian
from hybrid_opt.estimators.perturbation import Member
from hybrid_opt.estimators.rehearsal import Rehearsal, rehearse
from hybrid_opt.objectives.contract import Objective, select


@dataclass(frozen=True)
class _Forms:
    """How each parameter is perturbed, as far as a rehearsal has shown that it can be."""

    low_rank: Mapping[str, nn.Parameter]
    dense: Mapping[str, nn.Parameter]
    outside: Collection[str]
    bytes_per_example: int


class LowRankPerturbation:
    """`W + sign * sigma / sqrt(r) * B^T A` for a matrix W (m, n); `w + sign * sigma * eps` for a vector.

    Args:
        otherwise: what to do with a parameter that cannot be evaluated this way: `refuse` it with an error, give it
            `dense` noise (one member a forward pass), or leave it `frozen`.
    """

    def __init__(
        self,
        noise_rank: int,
        sigma: float,
        *,
        otherwise: str = "refuse",
        forward_size: ForwardSize | None = None,
    ):
        self.noise_rank = noise_rank
        self.sigma = sigma
        self.otherwise = otherwise
        self.forward_size = forward_size or ForwardSize()
        self.dense = DensePerturbation("gaussian", sigma)
        self._forms: dict[frozenset[str], _Forms] = {}

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Perturbation.check`."""
        reasons = why_not(engine.model, {name: engine.parameters[name] for name in names})
        if reasons and self.otherwise == "refuse":
            raise UserError(refusal(*next(iter(reasons.items()))))

    def evaluate(
        self,
        engine: Engine,
        objective: Objective,
        batch: Any,
        names: Collection[str],
        members: Sequence[Member],
        examples: Tensor | None,
    ) -> Tensor:
        """See `Perturbation.evaluate`. A forward pass takes the examples of many members, member-major.

        Raises:
            UserError: a parameter cannot be evaluated this way, and `otherwise` is `refuse`.
        """
        forms = self._rehearsed(engine, objective, batch, names)

        def losses_of(piece: Piece) -> Tensor:
            some = members[piece.members]
            part, rows = batch, len(some)
            if examples is not None:
                numbers = examples[piece.members, piece.examples]
                part, rows = select(batch, numbers.flatten()), numbers.numel()
            with self._perturbed(engine.model, forms, some, rows):
                losses = objective.losses(engine.model, part)
            if examples is not None and len(losses) != rows:
                raise UserError(
                    f"objective: it returned {len(losses)} losses for a batch of {rows} examples; return one for each, and let "
                    "the first dimension of every tensor in a batch be the examples"
                )
            return losses.float().view(len(some), -1)

        if examples is None:  # a batch without tensors cannot be repeated, so members go one by one
            return torch.cat([losses_of(Piece(slice(i, i + 1), slice(None))) for i in range(len(members))])
        return self.forward_size.evaluate(
            losses_of,
            batch,
            examples,
            _members_per_direction(members),
            forms.bytes_per_example,
            engine.device,
            most=1 if forms.dense else None,
        )

    def add_noise(self, keys: Sequence[Key], coefficients: Tensor, shard: Shard, out: Tensor) -> None:
        """See `Perturbation.add_noise`. For a matrix, one product: `sum_i (c_i B_i)^T A_i = [c_i B_i]^T [A_i]`."""
        form = self._form_of(shard.name)
        if form == "dense":
            return self.dense.add_noise(keys, coefficients, shard, out)
        if form == "frozen":
            return None
        keys, device = [key.fold(shard.name) for key in keys], out.device
        c = coefficients.to(device, torch.float32)
        if len(shard.shape) != 2:
            out.addmv_(gaussian(keys, shard.start, len(out), device).T, c)
            return None
        n = shard.shape[1]
        first, last = shard.start // n, -(-(shard.start + len(out)) // n)  # the rows that the shard touches
        a, b = self._sides(keys, shard.shape, first, last, device)
        left, right = (b * (c / math.sqrt(self.noise_rank))[:, None, None]).flatten(0, 1).T, a.flatten(0, 1)
        if len(out) == (last - first) * n:
            out.view(-1, n).addmm_(left, right)  # in place: the product itself would be as large as the matrix
        else:
            offset = shard.start - first * n
            out += (left @ right).view(-1)[offset : offset + len(out)]
        return None

    @contextmanager
    def perturbed(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], members: Sequence[Member], rows: int):
        """Inside, forward passes take `rows` rows, member-major: as many for each member, with the member's weights.

        For example `model.generate` for a batch of prompts that was repeated for each member.

        Args:
            members: one after another with equal keys next to each other, such as both members of an antithetic pair.

        Raises:
            UserError: see `perturbed_members`.
        """
        with perturbed_members(model, parameters, self._factors(parameters, members, rows)):
            yield

    def _perturbed(self, model: nn.Module, forms: _Forms, members: Sequence[Member], rows: int) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(self.perturbed(model, forms.low_rank, members, rows))
        if forms.dense:
            (member,) = members
            stack.enter_context(self.dense.perturbed(model, forms.dense, member, forms.outside))
        return stack

    def _factors(self, parameters: Mapping[str, nn.Parameter], members: Sequence[Member], rows: int) -> Factors:
        together = _members_per_direction(members)
        directions = [m.key for m in members[::together]]
        device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
        scale = torch.tensor([m.sign * self.sigma for m in members], device=device).view(-1, together)
        factors = Factors(rows, scale, {}, {})
        for names in _of_equal_shape(parameters):
            shape = parameters[names[0]].shape
            keys = [key.fold(name) for name in names for key in directions]
            if len(shape) == 2:
                dtype = parameters[names[0]].dtype
                sides = self._sides(keys, shape, 0, shape[0], device)
                a, b = (side.to(dtype).view(len(names), len(directions), *side.shape[1:]) for side in sides)
                factors.matrices.update(zip(names, zip(a, b, strict=True), strict=True))
            else:
                noise = gaussian(keys, 0, shape.numel(), device).view(len(names), len(directions), *shape)
                factors.vectors.update(zip(names, noise, strict=True))
        return factors

    def _sides(
        self, keys: Sequence[Key], shape: torch.Size, first: int, last: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """A (keys, r, n), and B (keys, r, last - first) for some of the rows; a key's A comes before its B."""
        r, (m, n) = self.noise_rank, shape
        if (first, last) == (0, m):
            a, b = gaussian(keys, 0, r * (n + m), device).split([r * n, r * m], dim=1)
            return a.view(-1, r, n), b.view(-1, r, m)
        a = gaussian(keys, 0, r * n, device)
        b = [gaussian(keys, r * n + k * m + first, last - first, device) for k in range(r)]
        return a.view(-1, r, n), torch.stack(b, dim=1)

    def _form_of(self, name: str) -> str:
        for forms in self._forms.values():
            if name in forms.low_rank:
                return "low_rank"
            if name in forms.dense:
                return "dense"
        return "frozen" if self._forms else "low_rank"

    def _rehearsed(self, engine: Engine, objective: Objective, batch: Any, names: Collection[str]) -> _Forms:
        key = frozenset(names)
        if key not in self._forms:
            parameters = {name: p for name, p in engine.parameters.items() if name in key}
            found = rehearse(engine.model, objective, batch, parameters)
            reasons = _found_reasons(found) | why_not(engine.model, parameters)
            if reasons and self.otherwise == "refuse":
                raise UserError(refusal(*next(iter(reasons.items()))))
            low_rank = {name: p for name, p in parameters.items() if name not in reasons}
            dense = {name: parameters[name] for name in reasons} if self.otherwise == "dense" else {}
            self._forms[key] = _Forms(low_rank, dense, found.outside, found.bytes_per_example)
        return self._forms[key]


def _members_per_direction(members: Sequence[Member]) -> int:
    """2 if members come in pairs of the same noise, one after the other; else 1."""
    paired = len(members) % 2 == 0 and all(a.key == b.key for a, b in zip(members[::2], members[1::2], strict=True))
    return 2 if paired else 1


def _of_equal_shape(parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Names by shape and dtype: noise for many tensors at once is much faster than for each."""
    groups: dict[Any, list[str]] = {}
    for name, p in parameters.items():
        groups.setdefault((p.shape, p.dtype), []).append(name)
    return list(groups.values())


def _found_reasons(found: Rehearsal) -> dict[str, str]:
    reasons = dict.fromkeys(found.uncalled, "the forward pass does not call the module that it belongs to")
    reasons |= dict.fromkeys(found.outside, "it is used outside its own module's forward pass")
    for name, rows in found.fixed_rows.items():
        if rows != 1:  # a single row is dealt out to all members
            reasons[name] = (
                f"its module is called with {rows} rows whatever the number of examples, so the rows of different members "
                "cannot be told apart"
            )
    return reasons
