"""Evaluation by hooks against weights that are really written: `W + sigma / sqrt(r) B A^T`."""

import re

import pytest
import torch
from torch import nn

from hybrid_opt.engines.contract import Shard
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.low_rank import LowRankPerturbation
from hybrid_opt.estimators.member_hooks import perturbed_members
from hybrid_opt.estimators.noise import Key
from hybrid_opt.estimators.perturbation import Member
from hybrid_opt.objectives.contract import FunctionObjective
from tests.conftest import tiny_model, token_batch, token_losses

SIGMA = 0.05
MEMBERS = [Member(Key((0,)).fold(i // 2), 1 if i % 2 == 0 else -1) for i in range(6)]
MODELS = {
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "llama, own head": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "gemma3": ("gemma3_text", {}),
    "mistral": ("mistral", {}),
}


@torch.no_grad()
def losses_of_written_weights(engine: LocalEngine, perturbation: LowRankPerturbation, names) -> torch.Tensor:
    """Each member's losses with its weights written out, (members, examples)."""
    rows = []
    for member in MEMBERS:
        before = {name: engine.parameters[name].data.clone() for name in names}
        for shard in engine.shards(names):
            shard.data.add_(perturbation.combine([member.key], torch.tensor([member.sign * SIGMA]), shard))
        rows.append(token_losses(engine.model, token_batch()))
        for name in names:
            engine.parameters[name].data.copy_(before[name])
    return torch.stack(rows)


@torch.no_grad()
def losses_by_hooks(engine: LocalEngine, perturbation: LowRankPerturbation, names) -> torch.Tensor:
    return perturbation.evaluate(engine, FunctionObjective(token_losses), token_batch(), names, MEMBERS)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("noise_rank", [1, 3])
def test_all_parameters_at_once(kind, noise_rank):
    architecture, settings = MODELS[kind]
    engine = LocalEngine(tiny_model(architecture, **settings))
    perturbation = LowRankPerturbation(noise_rank, SIGMA, members_per_forward=6)
    names = list(engine.parameters)
    hooked, written = (
        losses_by_hooks(engine, perturbation, names),
        losses_of_written_weights(engine, perturbation, names),
    )
    assert torch.allclose(hooked, written, rtol=0, atol=2e-6)
    assert (hooked - token_losses(engine.model, token_batch())).abs().min() > 1e-4  # every member does differ


@pytest.mark.parametrize("kind", MODELS)
def test_each_parameter_alone(kind):
    """Linear, Conv1D, embedding, tied head, position embedding, norms and biases, one at a time."""
    architecture, settings = MODELS[kind]
    engine = LocalEngine(tiny_model(architecture, **settings))
    perturbation = LowRankPerturbation(2, SIGMA, members_per_forward=6)
    plain = token_losses(engine.model, token_batch())
    for name in engine.parameters:
        hooked = losses_by_hooks(engine, perturbation, [name])
        assert torch.allclose(hooked, losses_of_written_weights(engine, perturbation, [name]), rtol=0, atol=2e-6), name
        # Softmax does not see what is added to all keys; a model may never look at its padding's position.
        if not re.search(r"k_proj\.bias|c_attn\.bias", name):
            assert (hooked - plain).abs().max() > 1e-7, name


@pytest.mark.parametrize("members_per_forward", [1, 2, 4, 5])
def test_any_number_of_members_a_forward_gives_the_same_losses(members_per_forward):
    engine = LocalEngine(tiny_model())
    names = list(engine.parameters)
    together = losses_by_hooks(engine, LowRankPerturbation(1, SIGMA, 6), names)
    assert torch.allclose(
        losses_by_hooks(engine, LowRankPerturbation(1, SIGMA, members_per_forward), names), together, rtol=0, atol=1e-6
    )


def test_combination_is_the_sum_of_outer_products_and_slices_agree():
    perturbation, shape = LowRankPerturbation(2, SIGMA, 1), torch.Size([7, 5])
    keys, c = [Key((i,)) for i in range(4)], torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
    whole = Shard("w", torch.zeros(35), 0, shape)
    one_by_one = sum(c[i] * perturbation.combine([k], torch.ones(1), whole) for i, k in enumerate(keys))
    combined = perturbation.combine(keys, c, whole)
    assert torch.allclose(combined, one_by_one.float(), atol=1e-6)
    for start, count in ((0, 35), (3, 1), (4, 12), (34, 1)):
        part = perturbation.combine(keys, c, Shard("w", torch.zeros(count), start, shape))
        assert torch.allclose(part, combined[start : start + count], atol=1e-6)
    ranks = torch.linalg.matrix_rank(perturbation.combine(keys[:1], torch.ones(1), whole).view(shape))
    assert ranks == 2


def test_same_shaped_matrices_get_independent_noise():
    perturbation, shape = LowRankPerturbation(1, SIGMA, 1), torch.Size([200, 200])
    a, b = (perturbation.combine([Key((0,))], torch.ones(1), Shard(n, torch.zeros(40_000), 0, shape)) for n in "ab")
    assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.1


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        return x * self.scale


def gate_losses(model, batch):
    return model(batch).sum(1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scale", "low rank noise cannot be evaluated for parameter scale because it belongs to a Gate module"),
        ("unused.weight", "the forward pass does not call the Linear module of parameter unused.weight"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_not_skipped(name, message):
    engine = LocalEngine(Gate())
    with torch.no_grad(), pytest.raises(UserError, match=message):
        LowRankPerturbation(1, SIGMA, 2).evaluate(
            engine, FunctionObjective(gate_losses), torch.ones(2, 4), [name], MEMBERS[:2]
        )


class Positions(nn.Module):
    """nanoGPT's way: one row of positions for the whole batch."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(8, 4), nn.Embedding(6, 4)

    def forward(self, ids):
        return self.words(ids) + self.places(torch.arange(ids.shape[1]))


def test_positions_of_one_row_are_refused_even_where_they_could_be_dealt_out():
    engine, ids = LocalEngine(Positions()), torch.zeros(1, 6, dtype=torch.long)
    objective = FunctionObjective(lambda model, batch: model(batch).sum((1, 2)))
    with (
        torch.no_grad(),
        pytest.raises(UserError, match=r"parameter places.weight is called with 6 rows for 4 examples"),
    ):
        LowRankPerturbation(1, SIGMA, 4).evaluate(engine, objective, ids, list(engine.parameters), MEMBERS[:4])


def test_batches_of_texts_are_repeated_or_evaluated_one_member_at_a_time():
    """A reward that needs more than tensors sees each member's rows, in one pass or in several."""
    engine = LocalEngine(tiny_model())
    ids, words = token_batch()["input_ids"], ["a", "bb", "ccc"]

    def losses(model, batch):
        tokens = ids if isinstance(batch, list) else batch["ids"]
        texts = batch if isinstance(batch, list) else batch["texts"]
        inputs = {"input_ids": tokens, "position_ids": torch.arange(tokens.shape[1]).repeat(len(tokens), 1)}
        return token_losses(model, inputs) * torch.tensor([float(len(text)) for text in texts])

    with torch.no_grad():
        together, alone = (
            LowRankPerturbation(1, SIGMA, 6).evaluate(
                engine, FunctionObjective(losses), batch, list(engine.parameters), MEMBERS
            )
            for batch in ({"ids": ids, "texts": words}, words)
        )
    assert torch.allclose(together, alone, rtol=0, atol=1e-5)
    assert together.shape == (6, 3)


def test_losses_that_are_not_one_an_example_are_refused():
    engine = LocalEngine(tiny_model())
    objective = FunctionObjective(lambda model, batch: token_losses(model, batch)[:4])
    with torch.no_grad(), pytest.raises(UserError, match="returned 4 losses for a batch of 18 examples"):
        LowRankPerturbation(1, SIGMA, 6).evaluate(engine, objective, token_batch(), list(engine.parameters), MEMBERS)


@pytest.mark.parametrize("kind", ["llama, own head", "gpt2"])
def test_norm_weights_near_1_are_perturbed_in_bfloat16_too(kind):
    """A sigma of 1e-3 is below bfloat16's spacing at 1, so weight plus noise must not be rounded to it."""
    architecture, settings = MODELS[kind]
    exact = LocalEngine(tiny_model(architecture, **settings))
    narrow = LocalEngine(tiny_model(architecture, **settings).bfloat16())
    name = next(n for n in exact.parameters if "norm.weight" in n or "ln_f.weight" in n)
    perturbation, x = LowRankPerturbation(1, 1e-3, 6), torch.ones(6, 5, 32) * torch.tensor([1.0, -1.0]).repeat(16)
    moved = []
    with torch.no_grad():
        for engine in (exact, narrow):
            norm = dict(engine.model.named_modules())[name.removesuffix(".weight")]
            norm.weight.fill_(1.0)
            factors = perturbation._factors({name: norm.weight.shape}, MEMBERS, 6, torch.device("cpu"))
            plain = norm(x.to(norm.weight.dtype)).float()
            with perturbed_members(engine.model, {name: engine.parameters[name]}, factors):
                moved.append((norm(x.to(norm.weight.dtype)).float() - plain).abs().mean().item())
    # The output is rounded to bfloat16's spacing at 1 (0.004 below, 0.008 above), so some of it survives, not all.
    assert moved[0] == pytest.approx(1e-3 * (2 / torch.pi) ** 0.5, rel=0.3)
    assert moved[1] > 0


def test_positions_shared_by_all_rows_are_refused():
    engine = LocalEngine(tiny_model("gpt2"))
    batch = {"input_ids": token_batch()["input_ids"]}  # GPT-2 then looks up one row of positions for everybody
    with torch.no_grad(), pytest.raises(UserError, match="pass position_ids for every row"):
        LowRankPerturbation(1, SIGMA, 6).evaluate(
            engine, FunctionObjective(token_losses), batch, list(engine.parameters), MEMBERS
        )
