"""One whole EA4LLM step against a float64 computation straight from the paper's equations (arXiv 2510.10603)."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_opt import HybridOptimizer, Key, load_schedule
from hybrid_opt.config.data import Data
from hybrid_opt.noise.drawing import gaussian
from hybrid_opt.objectives.batches import ShuffledBatches
from hybrid_opt.objectives.causal_lm import CausalLmData, CausalLmObjective
from hybrid_opt.objectives.data import load_splits
from tests.conftest import GLASS, SPAM

SEED, SAMPLES = 11, 5
N, SIGMA, ALPHA = 30, 1e-3, 5e-4  # the paper's population, sigma and alpha


@pytest.fixture(scope="module")
def setting():
    """The small pretrained model, and a step's M samples drawn without replacement."""
    data = Data(train=str(SPAM), prompt="{body}\nSubject:", completion=" {subject}", max_tokens=96)
    rows, _ = load_splits(data)
    tokenizer = AutoTokenizer.from_pretrained(GLASS)
    source = CausalLmData(data, tokenizer)
    examples = source.encode(rows.select(range(60)))
    batches = ShuffledBatches(examples, SAMPLES, source.collate, SEED)
    return examples, batches


def fitness(model: torch.nn.Module, examples) -> float:
    """`1/M sum_samples 1/|T| sum_t log softmax(z_t)[x_{t+1}]` over unmasked positions, one unpadded sample at a time."""
    values = []
    for example in examples:
        tokens = torch.tensor([*example.prompt, *example.completion])
        log_p = model(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
        positions = range(len(example.prompt) - 1, len(tokens) - 1)
        values.append(sum(log_p[t, tokens[t + 1]] for t in positions) / len(positions))
    return (sum(values) / len(values)).item()


@pytest.fixture(scope="module")
def members(setting):
    """Weights before, the N directions by parameter, and the fitnesses r, in float64, members written out one by one."""
    examples, batches = setting
    batches.batch_at(0)
    drawn = [examples[i] for i in batches._order[:SAMPLES]]
    assert len({id(example) for example in drawn}) == SAMPLES
    model = AutoModelForCausalLM.from_pretrained(GLASS).double().eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    keys = [Key((SEED, 0)).fold("es").fold(i) for i in range(N)]
    directions = {
        name: torch.cat([gaussian([key.fold(name)], 0, p.numel(), torch.device("cpu")) for key in keys]).view(
            N, *p.shape
        )
        for name, p in before.items()
    }
    fitnesses = []
    with torch.no_grad():
        for i in range(N):
            for name, p in model.named_parameters():
                p.copy_(before[name] + SIGMA * directions[name][i].double())
            fitnesses.append(fitness(model, drawn))
    return before, directions, torch.tensor(fitnesses, dtype=torch.float64)


@pytest.mark.parametrize("weights", ["standardize", "centered_rank"])
@pytest.mark.parametrize("divide_by_sigma", [False, True])
def test_one_step(setting, members, weights, divide_by_sigma):
    recipe = load_schedule("ea4llm").model_dump()
    es = recipe["estimators"]["es"]
    assert (es["population_size"], es["sigma"], es["learning_rate"], es["antithetic"]) == (N, SIGMA, ALPHA, False)
    assert (es["fitness_shaping"], es["divide_by_sigma"]) == ("standardize", False)
    es |= {"fitness_shaping": weights, "divide_by_sigma": divide_by_sigma}
    model = AutoModelForCausalLM.from_pretrained(GLASS)  # float32, as users run it
    report = HybridOptimizer(model, CausalLmObjective(), schedule=recipe, seed=SEED).step(setting[1].batch_at(0))

    before, directions, r = members
    if weights == "standardize":
        w = (r - r.mean()) / (r.std(correction=0) + 1e-8)
    else:
        w = 2 * r.argsort().argsort().double() / (N - 1) - 1
    rate = ALPHA / SIGMA if divide_by_sigma else ALPHA
    for name, p in model.named_parameters():
        step = rate / N * torch.tensordot(w, directions[name].double(), dims=1)
        moved = p.detach().double() - before[name]
        # What is left comes from float32 losses, whose spread over the members is a small part of their size.
        assert (moved - step).norm() < 0.02 * step.norm(), name
    assert report.loss == pytest.approx(-r.mean().item(), abs=1e-4)
    assert report.costs["es"].loss_spread == pytest.approx(r.std(correction=0).item(), rel=0.02)
    assert (report.costs["es"].forwards, report.costs["es"].backwards) == (N, 0)
