"""Low rank perturbation: many members share one forward pass, and weights are never written. Next: `sides.py`.

One idea: a matrix's noise is `E = B^T A` with thin sides B (r, m) and A (r, n), so a layer's output for a perturbed matrix is its plain
output plus two thin products, which can differ from row to row of a batch.
Source: EGGROLL (arXiv 2511.16652).
"""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_opt.engines.contract import Engine, Shard, whole_shape
from hybrid_opt.errors import UserError
from hybrid_opt.noise.drawing import gaussian
from hybrid_opt.noise.keys import Key, StepKey
from hybrid_opt.objectives.contract import Objective, select
from hybrid_opt.perturbations.contract import Member
from hybrid_opt.perturbations.dense import DensePerturbation
from hybrid_opt.perturbations.drawn_noise import DrawnNoise
from hybrid_opt.perturbations.factors import Factors
from hybrid_opt.perturbations.forward_size import ForwardSize, Piece, one_by_one
from hybrid_opt.perturbations.kept_memory import KeptMemory
from hybrid_opt.perturbations.member_hooks import MemberHooks, why_not
from hybrid_opt.perturbations.refusal import refusal
from hybrid_opt.perturbations.rehearsal import Rehearsal, rehearse
from hybrid_opt.perturbations.sides import FreshSides, Sides


@dataclass(frozen=True)
class _Forms:
    """How each parameter is perturbed, as far as a rehearsal has shown that it can be."""

    hooks: MemberHooks
    """For the parameters that are perturbed low rank."""
    dense: Mapping[str, nn.Parameter]
    found: Rehearsal

    def of(self, name: str) -> str:
        """`low_rank`, `dense` or `frozen`."""
        return "low_rank" if name in self.hooks.parameters else "dense" if name in self.dense else "frozen"


class LowRankPerturbation:
    """`W + sign * sigma * B^T A` for a matrix W (m, n); `w + sign * sigma * eps` for a vector.

    Args:
        sides: where A and B come from, or the rank of independent ones, standard normal and divided by the root of the rank.
        otherwise: what to do with a parameter that cannot be evaluated this way: `refuse` it with an error, give it
            `dense` noise (one member a forward pass), or leave it `frozen`.
    """

    def __init__(
        self,
        sides: Sides | int,
        sigma: float,
        *,
        otherwise: str = "refuse",
        forward_size: ForwardSize | None = None,
    ) -> None:
        self.sides = FreshSides(sides) if isinstance(sides, int) else sides
        self.sigma = sigma
        self.scales: Mapping[str, float] = {}
        self.otherwise = otherwise
        self.forward_size = forward_size or ForwardSize()
        self.dense = DensePerturbation("gaussian", sigma)
        self._forms: dict[tuple[nn.Module, frozenset[str]], _Forms] = {}
        self._form_of: dict[str, str] = {}  # how a parameter was last evaluated, and so is updated
        self._drawn, self._memory = DrawnNoise(), KeptMemory()

    def check(self, engine: Engine, names: Collection[str]) -> None:
        """See `Perturbation.check`."""
        reasons = why_not(engine.model, {name: engine.parameters[name] for name in names})
        if reasons and self.otherwise == "refuse":
            raise UserError(refusal(*next(iter(reasons.items()))))
        self.sides.check(engine, [name for name in names if name not in reasons])

    def ready(self, engine: Engine, names: Collection[str], keys: Sequence[Key], key: StepKey) -> "LowRankPerturbation":
        """See `Perturbation.ready`. What has been found of the model and kept of the noise is one for all steps."""
        result = copy(self)
        result.sides = self.sides.ready(key)
        result.dense = copy(self.dense)
        result.dense.scales = self.scales
        return result

    @property
    def exceptions(self) -> dict[str, str]:
        """See `Perturbation.exceptions`: parameters that are `dense` or `frozen`."""
        return {name: form for name, form in self._form_of.items() if form != "low_rank"}

    @exceptions.setter
    def exceptions(self, forms: Mapping[str, str]) -> None:
        self._form_of.clear()
        self._form_of.update(forms)

    def dimension(self, engine: Engine, names: Collection[str]) -> int:
        """See `Perturbation.dimension`: all, as far as an evaluation has not found some that it must leave frozen."""
        moved = [name for name in names if self._form_of.get(name) != "frozen"]
        return sum(whole_shape(engine.parameters[name]).numel() for name in moved)

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
        self._form_of |= {name: forms.of(name) for name in names}
        self._drawn.forget()
        held: tuple[Sequence[Member], Factors] | None = None

        def factors_of(some: Sequence[Member], rows: int) -> Factors:
            nonlocal held
            if held is None or held[0] != some:  # micro-batches of the same members come one after another
                held = (some, self._factors(forms.hooks, some))
            held[1].rows = rows
            return held[1]

        def losses_of(piece: Piece) -> Tensor:
            some = members[piece.members]
            part, rows = batch, len(some)
            if examples is not None:
                numbers = examples[piece.members, piece.examples]
                part, rows = select(batch, numbers.flatten()), numbers.numel()
            with self._perturbed(engine.model, forms, some, factors_of(some, rows)):
                losses = objective.losses(engine.model, part)
            if examples is not None and len(losses) != rows:
                raise UserError(
                    f"objective: it returned {len(losses)} losses for a batch of {rows} examples; return one for each, and let "
                    "the first dimension of every tensor in a batch be the examples"
                )
            return losses.float().view(len(some), -1)

        if examples is None:
            return one_by_one(losses_of, len(members))
        return self.forward_size.evaluate(
            losses_of,
            objective,
            batch,
            examples,
            _members_per_direction(members),
            forms.found.bytes_per_example,
            engine,
            most=1 if forms.dense else None,
        )

    def add_noise(self, keys: Sequence[Key], coefficients: Tensor, shard: Shard, out: Tensor) -> None:
        """See `Perturbation.add_noise`. For a matrix, one product: `sum_i (c_i B_i)^T A_i = [c_i B_i]^T [A_i]`."""
        form = self._form_of.get(shard.name, "low_rank")
        if form == "dense":
            return self.dense.add_noise(keys, coefficients, shard, out)
        if form == "frozen":
            return None
        c = (coefficients / self.scales.get(shard.name, 1.0)).to(out.device, torch.float32)
        if len(shard.shape) != 2:
            noise = self._drawn.recall(keys, shard.name, shard.start, shard.start + len(out))
            if noise is None:
                noise = [gaussian([key.fold(shard.name) for key in keys], shard.start, len(out), out.device)]
            out.addmv_(noise[0].T, c)
            return None
        n = shard.shape[1]
        first, last = shard.start // n, -(-(shard.start + len(out)) // n)  # the rows that the shard touches
        sides = self._drawn.recall(keys, shard.name, first, last)
        if sides is None:
            sides = self.sides.rows(keys, shard.name, shard.shape, first, last, out.device)
        b, a = (side.flatten(0, 1) for side in sides)
        c = c.repeat_interleave(len(b) // len(c)) if len(b) > len(c) else c
        left = (b * c.unsqueeze(1)).T
        if len(out) == (last - first) * n:
            out.view(-1, n).addmm_(left, a)  # in place: the product itself would be as large as the matrix
        else:
            offset = shard.start - first * n
            out += (left @ a).view(-1)[offset : offset + len(out)]
        return None

    @contextmanager
    def perturbed(self, hooks: MemberHooks, members: Sequence[Member], rows: int) -> Iterator[None]:
        """Inside, forward passes take `rows` rows, member-major: as many for each member, with the member's weights.

        For example `model.generate` for a batch of prompts that was repeated for each member.

        Args:
            members: one after another with equal keys next to each other, such as both members of an antithetic pair.

        Raises:
            UserError: see `MemberHooks.attached`.
        """
        with hooks.attached(self._factors(hooks, members, rows)):
            yield

    @contextmanager
    def _perturbed(
        self, model: nn.Module, forms: _Forms, members: Sequence[Member], factors: Factors
    ) -> Iterator[None]:
        if not any(member.sign for member in members):
            yield
            return
        with forms.hooks.attached(factors):
            if not forms.dense:
                yield
                return
            (member,) = members
            with self.dense.perturbed(model, forms.dense, member, forms.found.outside):
                yield

    def _factors(self, hooks: MemberHooks, members: Sequence[Member], rows: int = 0) -> Factors:
        parameters = hooks.parameters
        together = _members_per_direction(members)
        directions = [m.key for m in members[::together]]
        device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
        scale = torch.tensor([m.sign * self.sigma for m in members], device=device).view(-1, together)
        factors = Factors(rows, scale, {}, {}, self._memory)
        for names in _of_equal_shape(parameters):
            p, shape = parameters[names[0]], whole_shape(parameters[names[0]])
            keys = [key.fold(name) for name in names for key in directions]
            count = self.sides.values(shape) if len(shape) == 2 else shape.numel()
            noise = gaussian(keys, 0, count, device, out=self._drawn.memory(len(keys), count, device))
            noise = noise.view(len(names), len(directions), count)
            if len(shape) == 2:
                b, a = self.sides.split(noise, names, shape)
                self._drawn.keep(names, directions, [side.expand(-1, len(directions), -1, -1) for side in (b, a)])
                b, a = (side.to(p.dtype).expand(-1, len(directions), -1, -1) for side in (self._scaled(names, b), a))
                factors.matrices.update(zip(names, zip(a, b, strict=True), strict=True))
            else:
                self._drawn.keep(names, directions, [noise])
                factors.vectors.update(zip(names, self._scaled(names, noise).unflatten(-1, shape), strict=True))
        factors.share(hooks.same_input)
        return factors

    def _scaled(self, names: Sequence[str], noise: Tensor) -> Tensor:
        """Noise of some parameters (names, ...) times their factors of sigma; what is kept for the update stays as it was drawn."""
        if not self.scales:
            return noise
        scales = torch.tensor([self.scales.get(name, 1.0) for name in names], device=noise.device)
        return noise * scales.view(-1, *[1] * (noise.dim() - 1))

    def _rehearsed(self, engine: Engine, objective: Objective, batch: Any, names: Collection[str]) -> _Forms:
        key = (engine.model, frozenset(names))
        if key not in self._forms:
            parameters = {name: p for name, p in engine.parameters.items() if name in key[1]}
            found = rehearse(engine, objective, batch, parameters)
            reasons = _found_reasons(found) | why_not(engine.model, parameters)
            if reasons and self.otherwise == "refuse":
                raise UserError(refusal(*next(iter(reasons.items()))))
            if reasons:
                done = "get dense noise, one member a forward pass" if self.otherwise == "dense" else "are left frozen"
                listed = "; ".join(f"{name}, because {reason}" for name, reason in reasons.items())
                warnings.warn(f"these parameters {done}: {listed}", RuntimeWarning, stacklevel=2)
            low_rank = {name: p for name, p in parameters.items() if name not in reasons}
            dense = {name: parameters[name] for name in reasons} if self.otherwise == "dense" else {}
            self._forms[key] = _Forms(MemberHooks(engine.model, low_rank, found.same_input), dense, found)
        return self._forms[key]


def _members_per_direction(members: Sequence[Member]) -> int:
    """2 if members come in pairs of the same noise, one after the other; else 1."""
    paired = len(members) % 2 == 0 and all(a.key == b.key for a, b in zip(members[::2], members[1::2], strict=True))
    return 2 if paired else 1


def _of_equal_shape(parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Names by shape and dtype: noise for many tensors at once is much faster than for each."""
    groups: dict[Any, list[str]] = {}
    for name, p in parameters.items():
        groups.setdefault((whole_shape(p), p.dtype), []).append(name)
    return list(groups.values())


def _found_reasons(found: Rehearsal) -> dict[str, str]:
    reasons = dict.fromkeys(found.uncalled, "the forward pass does not call the module that it belongs to")
    reasons |= dict.fromkeys(found.outside, "it is used outside its own module's forward pass")
    for how, calls in (
        ("whatever the number of examples", found.fixed_rows),
        ("that do not come example by example", found.scattered_rows),
    ):
        for name, rows in calls.items():
            reasons[name] = (
                f"its module is called with {rows} rows {how}, so the rows of different members cannot be told apart"
            )
    return reasons
