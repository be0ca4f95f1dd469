"""A hard router without a gradient, trained by ES while backprop trains its experts, against a frozen router and straight-through estimators.

    python examples/hard_router.py                      # the comparison, about 9 minutes on one core
    python examples/hard_router.py --seconds 2 --seeds 3 --rates 1e-3 --prepare 20

The model is a small transformer on bytes. Its feed-forward layers have three experts, and a router that reads the first 16 bytes sends each text to one of
them: an argmax. The experts come from fine-tuning on one source each (a novel, e-mails, film reviews), so it matters where a text is sent; the router
starts random. Arms, from the same start and with the same batches:

    frozen             the router stays as it is
    straight_through   forwards the chosen expert alone counts, backwards the softmax over all (Bengio et al., arXiv 1308.3432): computes all experts
    chosen_scaled      the same gradient for the chosen expert's gate alone: as cheap as frozen
    hybrid             schedules/router_es_experts_backprop.yaml, population 16: the router by ES, all else by backprop

Each arm takes its learning rate from the same grid, on a seed that is not reported.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybrid_opt import HybridOptimizer, load_schedule

HERE = Path(__file__).parent
READ, LENGTH, WIDTH, HIDDEN, LAYERS = 16, 64, 64, 128, 2
"""Bytes that the router reads, bytes of a text, and the model's shape."""
ARMS = ("frozen", "straight_through", "chosen_scaled", "hybrid")


def sources() -> dict[str, Tensor]:
    """Three kinds of text as ASCII codes; the last tenth of each is held out."""
    rows = {"spam/spam_train.jsonl": "body", "movies/movies_train.jsonl": "review"}
    texts = [(HERE.parent / "tests/data/pride_and_prejudice.txt").read_text(encoding="utf-8")]
    for file, key in rows.items():
        texts.append("\n".join(json.loads(line)[key] for line in (HERE / file).open(encoding="utf-8")))
    return {str(i): torch.tensor(list(text.encode("ascii", "replace"))) for i, text in enumerate(texts)}


TEXTS = sources()


def batch(generator: torch.Generator, size: int = 24, part: slice = slice(0, 0.9), only: str | None = None) -> Tensor:
    """Random pieces (size, LENGTH + 1), the sources in turns."""
    pieces = []
    for i in range(size):
        text = TEXTS[only or str(i % len(TEXTS))]
        text = text[int(part.start * len(text)) : int(part.stop * len(text))]
        first = torch.randint(len(text) - LENGTH - 1, (1,), generator=generator).item()
        pieces.append(text[first : first + LENGTH + 1])
    return torch.stack(pieces)


class Routed(nn.Module):
    """A transformer whose feed-forward layers have experts, one for each text."""

    def __init__(self, experts: int, how: str = "frozen"):
        super().__init__()
        self.how = how
        self.embed, self.position = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS + 1))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.experts = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(LAYERS)
            )
            for _ in range(experts)
        )
        self.router, self.head = nn.Linear(WIDTH, experts, bias=False), nn.Linear(WIDTH, 128, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (texts, LENGTH, 128)."""
        embedded = self.embed(ids)
        scores = self.router(F.layer_norm(embedded[:, :READ].mean(1), (WIDTH,)).detach())
        chosen = F.one_hot(scores.argmax(1), len(self.experts)).to(scores.dtype)
        gates = chosen + scores.softmax(1) - scores.softmax(1).detach() if self.how in ARMS[1:3] else chosen
        x = embedded + self.position.weight
        for layer in range(LAYERS):
            q, k, v = self.qkv[layer](self.norms[2 * layer](x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            x = x + self.out[layer](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + self._feed_forward(layer, self.norms[2 * layer + 1](x), gates, chosen)
        return self.head(self.norms[-1](x))

    def _feed_forward(self, layer: int, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        if self.how == "straight_through":  # the others' outputs are needed for the softmax's gradient
            return sum(gates[:, i, None, None] * expert[layer](x) for i, expert in enumerate(self.experts))
        result = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = chosen[:, i].nonzero().squeeze(1)
            if len(rows):
                result = result.index_add(0, rows, gates[rows, i, None, None] * expert[layer](x[rows]))
        return result


def losses(model: nn.Module, pieces: Tensor) -> Tensor:
    """Mean cross-entropy of each text's bytes after those that the router reads."""
    logits = model(pieces[:, :-1])[:, READ:]
    return F.cross_entropy(logits.transpose(1, 2), pieces[:, READ + 1 :], reduction="none").mean(1)


@torch.no_grad()
def held_out(model: nn.Module) -> float:
    """Mean loss on 480 texts of the held-out tenths."""
    generator = torch.Generator().manual_seed(99)
    return sum(losses(model, batch(generator, 48, slice(0.9, 1))).mean().item() for _ in range(10)) / 10


def fit(
    model: nn.Module, parameters: list[nn.Parameter], steps: int, generator: torch.Generator, only: str | None = None
) -> None:
    """Plain AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    for _ in range(steps):
        model.zero_grad()
        losses(model, batch(generator, only=only)).mean().backward()
        optimizer.step()


def prepared(seed: int, steps: int) -> dict[str, Tensor]:
    """Weights of a model trained on everything, whose feed-forward layers were then trained on each source by itself; a random router."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    trunk = Routed(1)
    fit(trunk, list(trunk.parameters()), steps, generator)
    weights = dict(trunk.state_dict())
    for i, source in enumerate(TEXTS):
        branch = copy.deepcopy(trunk)
        fit(branch, list(branch.experts.parameters()), steps, generator, only=source)
        own = {k: v for k, v in branch.state_dict().items() if k.startswith("experts.")}
        weights |= {k.replace("experts.0.", f"experts.{i}.", 1): v for k, v in own.items()}
    return weights | {"router.weight": 0.3 * torch.randn(len(TEXTS), WIDTH, generator=generator)}


def schedule(arm: str, rate: float) -> dict:
    """The recipe, or backprop alone on what the arm trains."""
    recipe = load_schedule("router_es_experts_backprop").model_dump(mode="json", by_alias=True)
    recipe["estimators"]["backprop"]["learning_rate"] = rate
    recipe["estimators"]["es"]["population_size"] = 16  # eight pairs, three texts for each
    if arm == "hybrid":
        return recipe
    router = {"match": "router", "use": "frozen" if arm == "frozen" else ["backprop"]}
    policy, alone = [router, {"match": ".*", "use": ["backprop"]}], {"type": "single", "estimator": "backprop"}
    return {"estimators": {"backprop": recipe["estimators"]["backprop"]}, "policy": policy, "schedule": alone}


def trained(arm: str, start: dict[str, Tensor], seed: int, rate: float, seconds: float) -> tuple[float, int, float]:
    """Held-out loss, steps and forward equivalents after so many seconds of steps."""
    model = Routed(len(TEXTS), arm)
    model.load_state_dict(start)
    hybrid = HybridOptimizer(model, losses, schedule=schedule(arm, rate), seed=seed)
    generator, spent = torch.Generator().manual_seed(1000 + seed), 0.0
    while spent < seconds:
        pieces, began = batch(generator), time.perf_counter()
        hybrid.step(pieces)
        spent += time.perf_counter() - began
    return held_out(model), hybrid.signals.step, hybrid.signals.forward_equivalents


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15, help="of steps, for each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="reported; each has a start of its own")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="the grid")
    parser.add_argument("--prepare", type=int, default=600, help="steps of AdamW for the trunk and for each expert")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates = dict.fromkeys(ARMS, options.rates[0])
    if len(options.rates) > 1:
        start = prepared(0, options.prepare)
        for arm in ARMS:
            rates[arm] = min(options.rates, key=lambda rate: trained(arm, start, 0, rate, options.seconds)[0])
    found: dict[str, list] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        start = prepared(seed, options.prepare)
        for arm in ARMS:
            found[arm].append(trained(arm, start, seed, rates[arm], options.seconds))
            print(f"seed {seed}, {arm}: loss {found[arm][-1][0]:.4f} after {found[arm][-1][1]} steps", flush=True)
    print(
        f"{'arm':<18}{'rate':>8}{'loss':>9}{'to hybrid':>11}   by seed{'':<16}{'steps':>7}{'forward equivalents':>21}"
    )
    for arm, runs in found.items():
        loss, steps, equivalents = (sum(column) / len(runs) for column in zip(*runs, strict=True))
        apart = [run[0] - own[0] for run, own in zip(runs, found["hybrid"], strict=True)]
        each = " ".join(f"{value:+.4f}" for value in apart)
        print(
            f"{arm:<18}{rates[arm]:>8g}{loss:>9.4f}{sum(apart) / len(apart):>+11.4f}   {each:<23}{steps:>7.0f}{equivalents:>21.0f}"
        )
