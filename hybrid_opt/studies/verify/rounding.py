"""How much of an update arrives in bfloat16 weights. Next: `registry.py`.

One idea: weights that all lie between two powers of two have the same spacing s, so rounding of a Gaussian update has a closed form.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hybrid_opt.engines.contract import Contribution
from hybrid_opt.engines.update_rules import Sgd
from hybrid_opt.estimators.probing import NoiseSum
from hybrid_opt.studies.verify.known_losses import Known
from hybrid_opt.studies.verify.quantity import Quantity, cosine, exactly, function_of_means
from hybrid_opt.studies.verify.sampling import DENSE, Trials, estimator_of

SPACING = 2.0**-13
"""Of bfloat16 values, which have 8 bits, between 2^-6 and 2^-5."""
SIZE = SPACING / 4
"""Standard deviation of the update."""
TERMS = range(1, 40)


def rounded_updates(trials: Trials) -> Iterator[Quantity]:
    """The cosine between an update u ~ N(0, d^2) of bfloat16 weights with spacing s and what it changes.

    Rounded to the nearest: `E[u D] = 2 s d sum_k phi(a_k)` and `E[D^2] = 2 s^2 sum_k (2k - 1) Q(a_k)`, `a_k = (k - 1/2) s/d`, phi and Q
    the normal density and tail. Rounded at random: `E[u D] = d^2`, and `E[D^2] - d^2 = E[f (s - f)]`, f the rest of u by s, which is
    `s^2/6 - s^2/pi^2 sum_k exp(-2 (pi k d/s)^2)/k^2`. A float32 master loses nothing.
    """
    laws = {"none": _nearest(), "stochastic_rounding": _at_random()}
    for master_weights, law in laws.items():
        samples = torch.stack([_arrived(master_weights, trials, repeat) for repeat in range(60)])
        yield function_of_means(f"cosine of a bf16 update, {master_weights}", law, samples, cosine, resolution=0.02)
    arrived = cosine(_arrived("fp32", trials, 0)).item()
    yield exactly("cosine of a bf16 model's update, fp32 masters", 1.0, arrived, tolerance=1e-6)


class _Weights(nn.Module):
    """Weights of one spacing."""

    def __init__(self) -> None:
        super().__init__()
        values = torch.rand(1 << 14, generator=torch.Generator().manual_seed(9))
        self.w = nn.Parameter(((0.6 * values + 1.2) * 2.0**-6).bfloat16())

    def batch(self) -> None:
        """None is needed."""


def _arrived(master_weights: str, trials: Trials, repeat: int) -> Tensor:
    """`<u, D>, |u|^2, |D|^2` of an update."""
    known = Known(_Weights(), master_weights=master_weights, seed=trials.seed)
    (shard,) = known.engine.shards(["w"])
    before = shard.data.double().clone()
    perturbation = estimator_of(type="spsa", perturbation=DENSE).perturbation
    noise = NoiseSum(perturbation, [trials.key(repeat).fold(0)], torch.ones(1).double())
    known.engine.apply([Contribution(noise, 1.0, ["w"], SIZE, Sgd())], repeat)
    (shard,) = known.engine.shards(["w"])
    update, change = -SIZE * known.read(noise).double(), shard.data.double() - before
    return torch.stack([update @ change, update @ update, change @ change])


def _nearest() -> float:
    at = [(k - 0.5) * SPACING / SIZE for k in TERMS]
    product = 2 * SPACING * SIZE * sum(math.exp(-(a**2) / 2) for a in at) / math.sqrt(2 * math.pi)
    square = 2 * SPACING**2 * sum((2 * k - 1) * math.erfc(a / math.sqrt(2)) / 2 for k, a in zip(TERMS, at, strict=True))
    return product / math.sqrt(square) / SIZE


def _at_random() -> float:
    ripple = sum(math.exp(-2 * (math.pi * k * SIZE / SPACING) ** 2) / k**2 for k in TERMS)
    noise = SPACING**2 / 6 - SPACING**2 / math.pi**2 * ripple
    return SIZE / math.sqrt(SIZE**2 + noise)
