"""Losses whose gradients are known. Next: `sampling.py`.

One idea: they are ordinary modules, so what is measured on them is what runs on a language model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import tanh

from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.estimators.contract import Estimate
from hybrid_opt.estimators.probing import NoiseSum
from hybrid_opt.noise.keys import Key
from hybrid_opt.objectives.contract import FunctionObjective
from hybrid_opt.perturbations.contract import Perturbation


class LinearLoss(nn.Module):
    """`L(W) = sum_l <G_l, W_l>` for matrices W_l (m, n), each in a linear layer of its own; all values of G are standard normal."""

    def __init__(self, m: int = 6, n: int = 8, layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for _ in range(layers))
        self.slopes = torch.randn(layers, m, n, generator=torch.Generator().manual_seed(5))
        for layer in self.layers:
            nn.init.zeros_(layer.weight)

    def forward(self, batch: Tensor) -> Tensor:
        """Losses (examples,); each example is the identity (n, n)."""
        return sum((layer(batch) * g.T).sum((1, 2)) for layer, g in zip(self.layers, self.slopes, strict=True))

    def batch(self) -> Tensor:
        """One example."""
        return torch.eye(self.slopes.shape[2])[None]

    def gradient(self) -> Tensor:
        """(values,)."""
        return self.slopes.flatten()


class QuadraticLoss(nn.Module):
    """`f(w) = 1/2 sum_i h_i w_i^2` with curvatures h from 0.5 to 1.5."""

    def __init__(self, values: int = 12) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(values, generator=torch.Generator().manual_seed(6)))
        self.h = torch.linspace(0.5, 1.5, values)

    def forward(self, batch: Tensor) -> Tensor:
        """The loss, as often as there are examples."""
        return (self.h * self.w.square()).sum().div(2).expand(len(batch))

    def batch(self) -> Tensor:
        """One example, with nothing in it."""
        return torch.zeros(1, 1)

    def gradient(self) -> Tensor:
        """(values,)."""
        return (self.h * self.w).detach().clone()


class LeastSquares(nn.Module):
    """`|A w - b|^2 / (4 n)` from w = 0, less its minimum; A (2n, n) and b standard normal."""

    def __init__(self, values: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = torch.randn(2 * values, values, generator=generator)
        self.b = torch.randn(2 * values, generator=generator)
        self.w = nn.Parameter(torch.zeros(values))
        self.least = self._loss(torch.linalg.lstsq(self.a, self.b[:, None])[0][:, 0])

    def forward(self, batch: Tensor) -> Tensor:
        """The loss, as often as there are examples."""
        return (self._loss(self.w) - self.least).expand(len(batch))

    def batch(self) -> Tensor:
        """One example, with nothing in it."""
        return torch.zeros(1, 1)

    def gradient(self) -> Tensor:
        """(values,)."""
        return (self.a.T @ (self.a @ self.w - self.b) / len(self.b)).detach()

    def _loss(self, w: Tensor) -> Tensor:
        return (self.a @ w - self.b).square().sum() / (2 * len(self.b))


class TiedLoss(nn.Module):
    """Next token from this one by an embedding, a linear layer and a head that is the embedding (its weight is tied)."""

    def __init__(self, vocabulary: int = 24, size: int = 16, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(vocabulary, size), nn.Linear(size, size)
        self.head = nn.Linear(size, vocabulary, bias=False)
        generator = torch.Generator().manual_seed(7)
        for p in self.parameters():
            p.data = (torch.randn(p.shape, generator=generator) / 4).to(dtype)
        self.head.weight = self.embedding.weight

    def forward(self, batch: Tensor) -> Tensor:
        """Mean cross-entropy of each row of tokens, (examples,)."""
        logits = self.head(tanh(self.inner(self.embedding(batch[:, :-1]))))
        return nn.functional.cross_entropy(logits.float().transpose(1, 2), batch[:, 1:], reduction="none").mean(1)

    def batch(self) -> Tensor:
        """Four rows of tokens."""
        vocabulary = self.embedding.num_embeddings
        return torch.randint(0, vocabulary, (4, 6), generator=torch.Generator().manual_seed(8))


class Known:
    """A loss with all that an estimator is given."""

    def __init__(self, loss: nn.Module, **engine: Any) -> None:
        self.loss = loss
        self.engine = LocalEngine(loss, device="cpu", **engine)
        self.objective = FunctionObjective(lambda model, batch: model(batch))
        self.batch = loss.batch()
        self.names = list(self.engine.parameters)

    def read(self, estimate: Estimate) -> Tensor:
        """All values of an estimate, (values,) float32."""
        return torch.cat([estimate.read(shard) for shard in self.engine.shards(self.names)])

    def direction(self, perturbation: Perturbation, key: Key) -> Tensor:
        """All values of a perturbation's direction, (values,) float32."""
        return self.read(NoiseSum(perturbation, [key], torch.ones(1).double()))
