"""How well estimates agree with backprop's gradient on a real model and the user's data. Next: `laws.py`, then `writing.py`.

One idea: the cosine `E<a, g> / (|g| sqrt(E|a|^2))` of an estimate a with the gradient g has a closed form on every group of layers, if the
loss is linear over sigma; where it is less, sigma is too large or too small for the weights' dtype.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.estimators import Estimator as EstimatorConfig
from hybrid_opt.config.run import RunFile
from hybrid_opt.config.schedule import acting_names
from hybrid_opt.display.progress import Silence
from hybrid_opt.engines.contract import whole_shape
from hybrid_opt.engines.inner_products import inner_products
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.contract import Estimate
from hybrid_opt.estimators.followers import Followers
from hybrid_opt.estimators.modes import training_mode
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import count_examples, select
from hybrid_opt.scheduling.policy import layer_number, may_ever_move
from hybrid_opt.studies.verify.laws import Part, directions_of, expected_cosine, expected_dimension
from hybrid_opt.studies.verify.quantity import WHOLE_RESOLUTION, Quantity, cosine, function_of_means
from hybrid_opt.training.build import build
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer

MOST_GROUPS = 8
FEWEST_ESTIMATES = 16
EXAMPLES_TOGETHER = 4
"""In a backward pass."""


@dataclass(frozen=True)
class RealModel:
    """A model on its device, two batches of the user's data, and the estimators that a run would use."""

    run: RunFile
    optimizer: HybridOptimizer
    batches: tuple[Any, Any]
    """The one that estimates are made for, and another."""

    @classmethod
    def load(cls, run: RunFile, allow_code: bool = False) -> "RealModel":
        """Load everything that a run file names.

        Args:
            allow_code: as for `build`.

        Raises:
            UserError: it does not fit together, or there is no gradient to compare with.
        """
        if run.engine.type != "local":
            raise UserError("engine: verify measures in one process; write engine.type=local after the run file")
        if run.objective.type == "reward" or not getattr(run.objective, "differentiable", True):
            raise UserError(f"objective: {run.objective.type} has no gradient to compare estimates with")
        with TemporaryDirectory() as folder:  # nothing is written there either
            quiet = run.model_copy(update={"output": f"{folder}/run", "report_to": "none"})
            trainer = build(quiet, allow_code=allow_code, display=Silence())
        return cls(run, trainer.optimizer, (trainer.batches.batch_at(0), trainer.batches.batch_at(1)))

    def measured(self, directions: int, show: Callable[[str], None]) -> Iterator[Quantity]:
        """For each estimator that acts in the run and minimises what the run does: its cosine with the gradient, the effective dimension that
        this implies, and the cosine on each group.

        Estimators that follow backprop are shown the gradient of another batch first.

        Args:
            directions: of each estimator, in all its independent estimates together; at least 16 estimates are made.
            show: is told what is going on.
        """
        config, optimizer = self.run.schedule, self.optimizer
        compared = {name: e for name, e in optimizer.estimators.items() if self._is_compared(name)}
        show("gradients")
        gradient, before = (self._gradient(batch) for batch in self.batches)
        may_move = {name: may_ever_move(config, optimizer.policies, name) for name in compared}
        Followers(optimizer.engine, compared, may_move).show(before, list(optimizer.engine.parameters))
        del before
        for name, estimator in compared.items():
            moved = [n for n in optimizer.engine.parameters if n in may_move[name]]
            groups = layer_groups(moved)
            energies = {group: self._energies(gradient, names) for group, names in groups.items()}
            groups = {group: names for group, names in groups.items() if sum(energies[group].values())}
            products = []
            count = estimates_for(self.run.schedule.estimators[name], directions)
            for number in range(count):
                show(f"{name}: estimate {number + 1} of {count}")
                key = StepKey(self.run.training.seed, number, name)
                arguments = (optimizer.objective, self.batches[0], moved, key)
                made, _ = estimator.estimate(optimizer.engine, *arguments)
                products.append(torch.stack([self._products(made, gradient, names) for names in groups.values()]))
            parts = {group: self._part(energies[group]) for group in groups}
            yield from _rows(name, self.run.schedule.estimators[name], parts, torch.stack(products))

    def _is_compared(self, name: str) -> bool:
        config = self.run.schedule.estimators[name]
        acts = name in acting_names(self.run.schedule.schedule)
        return acts and not isinstance(config, Backprop) and name not in self.run.objectives

    def _gradient(self, batch: Any) -> Estimate:
        """Of the mean loss over a batch, without dropout, as ES sees it."""
        engine, objective = self.optimizer.engine, self.optimizer.objective
        count = count_examples(batch)

        def loss_of(numbers: Tensor) -> Tensor:
            return objective.losses(engine.model, select(batch, numbers)).float().sum() / count

        parts = [partial(loss_of, numbers) for numbers in torch.arange(count).split(EXAMPLES_TOGETHER)]
        with training_mode(engine.model, False):
            return engine.gradients(parts, engine.parameters)[0]

    def _energies(self, gradient: Estimate, names: Collection[str]) -> dict[str, float]:
        """`|g|^2` of each parameter."""
        return {name: inner_products(self.optimizer.engine, [name], [gradient]).item() for name in names}

    @torch.no_grad()
    def _products(self, made: Estimate, gradient: Estimate, names: Collection[str]) -> Tensor:
        """`<a, g>, |a|^2, |g|^2` on some parameters, (3,) float64."""
        gram = inner_products(self.optimizer.engine, names, [made, gradient])
        return torch.stack([gram[0, 1], gram[0, 0], gram[1, 1]])

    def _part(self, energies: Mapping[str, float]) -> Part:
        parameters = self.optimizer.engine.parameters
        return Part([(tuple(whole_shape(parameters[name])), energy) for name, energy in energies.items()])


def _rows(name: str, config: EstimatorConfig, parts: Mapping[str, Part], products: Tensor) -> Iterator[Quantity]:
    """An estimator's rows; products: (estimates, parts, 3)."""
    whole = Part([tensor for part in parts.values() for tensor in part.tensors])
    directions, over_all = directions_of(config), products.sum(dim=1)
    yield function_of_means(
        f"{name}: cosine", expected_cosine(config, whole, whole), over_all, cosine, WHOLE_RESOLUTION
    )
    if directions is not None:

        def dimension(mean: Tensor) -> Tensor:
            return directions * (cosine(mean) ** -2 - 1)

        law = expected_dimension(config, whole, whole)
        yield function_of_means(f"{name}: effective dimension", law, over_all, dimension, 2 * WHOLE_RESOLUTION)
    for (group, part), found in zip(parts.items(), products.unbind(1), strict=True):
        law = expected_cosine(config, part, whole)
        yield function_of_means(f"{name}: cosine, {group}", law, found, cosine, resolution=math.inf)


def estimates_for(config: EstimatorConfig, directions: int) -> int:
    """How many estimates have that many directions together, and are enough to know how much they differ."""
    return max(
        FEWEST_ESTIMATES, -(-directions // getattr(config, "tangents", getattr(config, "directions", directions)))
    )


def layer_groups(names: Collection[str]) -> dict[str, list[str]]:
    """Parameters by their layers' numbers, of many layers some together; those without a number are one group."""
    numbers = sorted({number for name in names if (number := layer_number(name)) is not None})
    size = -(-len(numbers) // MOST_GROUPS) or 1
    groups: dict[str, list[str]] = {}
    for name in names:
        number = layer_number(name)
        if number is None:
            title = "outside the layers"
        else:
            first = numbers.index(number) // size * size
            block = numbers[first : first + size]
            title = f"layer {block[0]}" if len(block) == 1 else f"layers {block[0]} to {block[-1]}"
        groups.setdefault(title, []).append(name)
    return groups
