"""Losses whose gradients are known, and how far estimates are from them."""

import torch
from torch import nn

from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.estimators.contract import Estimator
from hybrid_opt.noise.keys import StepKey
from hybrid_opt.objectives.contract import FunctionObjective


class LinearLoss(nn.Module):
    """`L(W) = <G, W>` for a matrix W (m, n) that only ever appears in a linear layer, as low rank needs it."""

    def __init__(self, m: int, n: int):
        super().__init__()
        self.layer = nn.Linear(n, m, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.gradient = torch.randn(m, n, generator=torch.Generator().manual_seed(5))

    def losses(self, model, batch):
        return (model.layer(batch) * self.gradient.T).sum((1, 2))


def read_all(engine: LocalEngine, estimate) -> torch.Tensor:
    return torch.cat([estimate.read(shard) for shard in engine.shards(engine.parameters)])


def errors_and_cosines(estimator: Estimator, m: int, n: int, repeats: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`|estimate - g|^2 / |g|^2` and the cosine with g, for many independent estimates."""
    model = LinearLoss(m, n)
    engine, objective = LocalEngine(model), FunctionObjective(model.losses)
    g = model.gradient.flatten()
    estimates = torch.stack(
        [
            read_all(
                engine,
                estimator.estimate(engine, objective, torch.eye(n)[None], ["layer.weight"], StepKey(0, i, "estimator"))[
                    0
                ],
            )
            for i in range(repeats)
        ]
    )
    errors = (estimates - g).pow(2).sum(1) / g.pow(2).sum()
    return errors, torch.nn.functional.cosine_similarity(estimates, g[None])


def near(values: torch.Tensor, expected: float, resolution: float = 0.1) -> bool:
    """Whether the mean of independent values is within four standard errors of the expected one, and those are small enough to tell."""
    standard_error = values.std().item() / len(values) ** 0.5
    assert standard_error < resolution * abs(expected)
    return abs(values.mean().item() - expected) < 4 * standard_error


def quadratic():
    model = nn.Linear(5, 3)
    x, y = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2))

    def losses(model, batch):
        return (model(batch["x"]) - batch["y"][:, :3]).pow(2).sum(1)

    return model, FunctionObjective(losses), {"x": x, "y": y}
