"""Evaluation by hooks against weights that are really written: `W + sigma / sqrt(r) B A^T`."""

import inspect
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hybrid_opt.engines.contract import Shard
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.noise.keys import Key
from hybrid_opt.objectives.contract import FunctionObjective
from hybrid_opt.perturbations import drawn_noise, low_rank
from hybrid_opt.perturbations.contract import Member
from hybrid_opt.perturbations.dense import DensePerturbation
from hybrid_opt.perturbations.forward_size import ForwardSize
from hybrid_opt.perturbations.low_rank import LowRankPerturbation
from hybrid_opt.perturbations.member_hooks import MemberHooks
from tests.conftest import (
    Attention,
    Recurrent,
    losses_of_members,
    losses_of_written_weights,
    tiny_model,
    token_batch,
    token_losses,
)

SIGMA = 0.05
MEMBERS = [Member(Key((0,)).fold(i // 2), 1 if i % 2 == 0 else -1) for i in range(6)]
SINGLES = [Member(Key((0,)).fold(i), 1) for i in range(6)]
MODELS = {
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "llama, own head": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "gemma": ("gemma", {}),
    "gemma3": ("gemma3_text", {}),
    "mistral": ("mistral", {}),
}


@pytest.fixture(autouse=True)
def _same_weights_each_time():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def same(some, others) -> bool:
    return torch.allclose(some, others, rtol=0, atol=5e-6 * max(1.0, others.abs().max().item()))


def sum_losses(model, batch):
    """A loss of each example from whatever a model puts out, without anything that would even out differences."""
    output = model(batch)
    return output.flatten(1).pow(3).sum(1)


def agree(model, losses=sum_losses, batch=None, names=None, otherwise="refuse", members=MEMBERS, size=None):
    """Whether hooks and written weights give the same losses, which differ from the model's own."""
    engine = LocalEngine(model)
    names = list(engine.parameters) if names is None else names
    perturbation = LowRankPerturbation(2, SIGMA, otherwise=otherwise, forward_size=size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "these parameters", RuntimeWarning)  # otherwise: dense and frozen say so
        found = losses_of_members(engine, perturbation, names, members, losses, batch)
    written = losses_of_written_weights(engine, perturbation, names, members, losses, batch)
    with torch.no_grad():
        plain = losses(engine.model, batch)
    assert ((found - plain).abs() > 1e-5).any(0).all()
    return same(found, written)


# ---------------------------------------------------------------- language models


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("noise_rank", [1, 3])
def test_all_parameters_at_once(kind, noise_rank):
    architecture, settings = MODELS[kind]
    engine = LocalEngine(tiny_model(architecture, **settings))
    perturbation = LowRankPerturbation(noise_rank, SIGMA, forward_size=ForwardSize(members=6))
    names = list(engine.parameters)
    hooked, written = (
        losses_of_members(engine, perturbation, names, MEMBERS),
        losses_of_written_weights(engine, perturbation, names, MEMBERS),
    )
    assert torch.allclose(hooked, written, rtol=0, atol=2e-6)
    assert (hooked - token_losses(engine.model, token_batch())).abs().min() > 1e-4  # every member does differ


@pytest.mark.parametrize("kind", MODELS)
def test_each_parameter_alone(kind):
    """Linear, Conv1D, embedding, tied head, position embedding, norms and biases, one at a time."""
    architecture, settings = MODELS[kind]
    engine = LocalEngine(tiny_model(architecture, **settings))
    perturbation = LowRankPerturbation(2, SIGMA, forward_size=ForwardSize(members=6))
    plain = token_losses(engine.model, token_batch())
    for name in engine.parameters:
        hooked = losses_of_members(engine, perturbation, [name], MEMBERS)
        written = losses_of_written_weights(engine, perturbation, [name], MEMBERS)
        assert torch.allclose(hooked, written, rtol=0, atol=2e-6), name
        # Softmax does not see what is added to all keys; a model may never look at its padding's position.
        if not re.search(r"k_proj\.bias|c_attn\.bias", name):
            assert (hooked - plain).abs().max() > 1e-7, name


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama, own head"])
def test_positions_of_one_row_are_dealt_out_to_members(kind):
    """Without position_ids GPT-2 looks up one row of positions for everybody."""
    architecture, settings = MODELS[kind]
    assert agree(tiny_model(architecture, **settings), token_losses, {"input_ids": token_batch()["input_ids"]})


@pytest.mark.parametrize("kind", ["llama, own head", "gpt2"])
def test_an_objective_in_inference_mode(kind):
    """Its tensors do not count how often they were written."""
    architecture, settings = MODELS[kind]
    assert agree(tiny_model(architecture, **settings), torch.inference_mode()(token_losses), token_batch())


def test_layers_that_share_an_input_which_is_written_in_between():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            a, x = self.layers[0], x.clone()
            y = a(x) + self.layers[1](x)
            x.mul_(0.5)
            return y * self.layers[2](x) + a(x)

    assert agree(Model(), sum_losses, X)
    assert agree(Model(), sum_losses, X, otherwise="frozen", names=["layers.0.weight", "layers.1.bias"])
    assert agree(Model(), torch.inference_mode()(sum_losses), X)


# ---------------------------------------------------------------- encoders


def text_batch(**more) -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": token_batch()["input_ids"].clamp(min=3), "attention_mask": mask, **more}


def masked_losses(model, batch):
    logits = model(**batch).logits.transpose(1, 2)
    return F.cross_entropy(logits, batch["input_ids"], reduction="none")[:, ::3].mean(1)


def label_losses(model, batch):
    return F.cross_entropy(model(**batch).logits, torch.zeros(len(batch["input_ids"]), dtype=int), reduction="none")


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "modernbert"])
@pytest.mark.parametrize("task", ["masked", "label"])
def test_encoders_with_and_without_positions_and_token_types(kind, task):
    head, losses = {
        "masked": (AutoModelForMaskedLM, masked_losses),
        "label": (AutoModelForSequenceClassification, label_losses),
    }[task]
    model = tiny_model(kind, head)
    names = [name for name, _ in model.named_parameters() if name not in ("cls.predictions.bias", "lm_head.bias")]
    more = {"token_type_ids": torch.arange(7).clamp(max=1).repeat(3, 1) * (kind != "roberta")}
    more["position_ids"] = torch.arange(1, 8).repeat(3, 1)
    known = inspect.signature(type(model).forward).parameters
    assert agree(model, losses, text_batch(), names)
    extra = {key: value for key, value in more.items() if key in known}
    assert agree(model, losses, text_batch(**extra), names, size=ForwardSize(members=2, examples=2))


@pytest.mark.parametrize(("kind", "owner"), [("bert", "BertLMPredictionHead"), ("roberta", "RobertaLMHead")])
def test_a_bias_that_a_head_owns_together_with_its_linear_layer(kind, owner):
    model = tiny_model(kind, AutoModelForMaskedLM)
    with pytest.raises(UserError, match=rf"bias because it belongs to a {owner} module; .* otherwise: dense"):
        agree(model, masked_losses, text_batch())
    assert agree(model, masked_losses, text_batch(), otherwise="dense")
    assert agree(model, masked_losses, text_batch(), otherwise="frozen")


@pytest.mark.parametrize("tokens", [1, 5])
def test_relative_positions_of_t5_are_refused_or_dense(tokens):
    """Its tables are looked up without a dimension for examples; a decoder's first token makes this a single row."""
    model = tiny_model("t5", AutoModelForSeq2SeqLM)
    batch = text_batch(decoder_input_ids=token_batch(3, tokens)["input_ids"])

    def losses(model, batch):
        return model(**batch, use_cache=False).logits.log_softmax(-1)[:, 0, :3].mean(1)

    with pytest.raises(UserError, match=r"relative_attention_bias.weight because its module is called with 7 rows"):
        agree(model, losses, batch)
    assert agree(model, losses, batch, otherwise="dense")


def test_relative_positions_of_deberta_are_refused_or_dense():
    model = tiny_model("deberta-v2", AutoModelForSequenceClassification)
    with pytest.raises(UserError, match=r"rel_embeddings.weight because it is used outside its own module's forward"):
        agree(model, label_losses, text_batch())
    assert agree(model, label_losses, text_batch(), otherwise="dense")


# ---------------------------------------------------------------- members and examples of a forward pass


@pytest.mark.parametrize("members", [MEMBERS, SINGLES], ids=["pairs", "singles"])
def test_any_cut_into_forward_passes_gives_the_same_losses(members):
    engine = LocalEngine(tiny_model("gpt2", n_layer=1))
    names, rows = list(engine.parameters), []

    def counted(model, batch):
        rows.append(len(batch["input_ids"]))
        return token_losses(model, batch)

    written = losses_of_written_weights(engine, LowRankPerturbation(1, SIGMA), names, members)
    for a_forward in (1, 2, 3, 5, 6, None):
        for micro_batch in (1, 2, 3, None):
            perturbation = LowRankPerturbation(1, SIGMA, forward_size=ForwardSize(a_forward, micro_batch))
            assert torch.allclose(
                losses_of_members(engine, perturbation, names, members, counted), written, rtol=0, atol=1e-5
            )
    assert max(rows) == 18


@pytest.mark.parametrize(
    ("members", "a_forward", "sizes"),
    [
        (MEMBERS, 1, [1] * 6),
        (MEMBERS, 2, [2, 2, 2]),
        (MEMBERS, 3, [2, 2, 2]),
        (MEMBERS, 5, [2, 4]),
        (MEMBERS, 6, [6]),
        (SINGLES, 2, [2, 2, 2]),
        (SINGLES, 4, [3, 3]),
        (SINGLES, 5, [3, 3]),
        (SINGLES[:5], 2, [1, 2, 2]),
        (MEMBERS[:4], 9, [4]),
    ],
)
def test_members_are_split_evenly_and_pairs_are_not_parted(members, a_forward, sizes):
    engine = LocalEngine(tiny_model())
    perturbation = LowRankPerturbation(1, SIGMA, forward_size=ForwardSize(a_forward))
    rows, together, draw = [], [], perturbation._factors

    def counted(model, batch):
        rows.append(len(batch["input_ids"]))
        return token_losses(model, batch)

    def watched(hooks, some):
        together.append(list(some))
        return draw(hooks, some)

    losses_of_members(engine, perturbation, ["model.norm.weight"], members)  # it begins with a rehearsal
    perturbation._factors = watched
    losses_of_members(engine, perturbation, ["model.norm.weight"], members, counted)
    assert [count // 3 for count in rows] == sizes
    assert [member for some in together for member in some] == members
    if members[0].key == members[1].key and a_forward > 1:
        assert all(a.key == b.key for some in together for a, b in zip(some[::2], some[1::2], strict=False))


def test_members_that_see_different_examples():
    engine, objective = LocalEngine(tiny_model()), FunctionObjective(token_losses)
    examples = torch.tensor([[0, 2], [0, 2], [1, 1], [1, 1], [2, 0], [2, 0]])
    names = list(engine.parameters)
    written = losses_of_written_weights(engine, LowRankPerturbation(1, SIGMA), names, MEMBERS)
    for size in (ForwardSize(), ForwardSize(4, 1)):
        with torch.no_grad():
            found = LowRankPerturbation(1, SIGMA, forward_size=size).evaluate(
                engine, objective, token_batch(), names, MEMBERS, examples
            )
        assert torch.allclose(found, written.gather(1, examples), rtol=0, atol=1e-5)


def test_batches_of_texts_are_repeated_or_evaluated_one_member_at_a_time():
    """A reward that needs more than tensors sees each member's rows, in one pass or in several."""
    engine = LocalEngine(tiny_model())
    ids, words = token_batch()["input_ids"], ["a", "bb", "ccc"]

    def losses(model, batch):
        tokens = ids if isinstance(batch, list) else batch["ids"]
        texts = batch if isinstance(batch, list) else batch["texts"]
        inputs = {"input_ids": tokens, "position_ids": torch.arange(tokens.shape[1]).repeat(len(tokens), 1)}
        return token_losses(model, inputs) * torch.tensor([float(len(text)) for text in texts])

    together, alone = (
        losses_of_members(
            engine, LowRankPerturbation(1, SIGMA), list(engine.parameters), MEMBERS, losses=losses, batch=batch
        )
        for batch in ({"ids": ids, "texts": words}, words)
    )
    assert torch.allclose(together, alone, rtol=0, atol=1e-5)
    assert together.shape == (6, 3)


@pytest.mark.parametrize("noise_rank", [1, 8])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_autocast_computes_with_noise_as_with_weights(kind, noise_rank):
    """Weights stay float32 and products are made in bfloat16: both ways are as far from float32 as its rounding takes them."""

    def losses(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return token_losses(model, batch).float()

    engine, perturbation = LocalEngine(tiny_model(kind)), LowRankPerturbation(noise_rank, SIGMA)
    names = list(engine.parameters)
    hooked, written = (
        of(engine, perturbation, names, MEMBERS, losses) for of in (losses_of_members, losses_of_written_weights)
    )
    exact = losses_of_written_weights(engine, perturbation, names, MEMBERS)
    assert (exact - token_losses(engine.model, token_batch())).abs().max() > 0.1
    for found in (hooked, written):
        assert 1e-5 < (found - exact).abs().max() < 4e-3


def test_losses_that_are_not_one_an_example_are_refused():
    engine = LocalEngine(tiny_model())
    perturbation = LowRankPerturbation(1, SIGMA, forward_size=ForwardSize(members=6))
    with pytest.raises(UserError, match="returned 4 losses for a batch of 18 examples"):
        losses_of_members(
            engine, perturbation, list(engine.parameters), MEMBERS, losses=lambda *args: token_losses(*args)[:4]
        )


# ---------------------------------------------------------------- the noise


def noise_of(perturbation, keys, coefficients, shard) -> torch.Tensor:
    out = torch.zeros_like(shard.data)
    perturbation.add_noise(keys, coefficients, shard, out)
    return out


def test_combination_is_the_sum_of_outer_products_and_slices_agree():
    perturbation, shape = LowRankPerturbation(2, SIGMA), torch.Size([7, 5])
    keys, c = [Key((i,)) for i in range(4)], torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
    whole = Shard("w", torch.zeros(35), 0, shape)
    one_by_one = sum(c[i] * noise_of(perturbation, [k], torch.ones(1), whole) for i, k in enumerate(keys))
    combined = noise_of(perturbation, keys, c, whole)
    assert torch.allclose(combined, one_by_one.float(), atol=1e-6)
    for start, count in ((0, 35), (3, 1), (4, 12), (5, 10), (34, 1)):
        part = Shard("w", torch.zeros(count), start, shape)
        assert torch.allclose(noise_of(perturbation, keys, c, part), combined[start : start + count], atol=1e-6)
        out = torch.arange(float(count))
        perturbation.add_noise(keys, c, part, out)
        assert torch.allclose(out, torch.arange(float(count)) + combined[start : start + count], atol=4e-6)
    ranks = torch.linalg.matrix_rank(noise_of(perturbation, keys[:1], torch.ones(1), whole).view(shape))
    assert ranks == 2


def test_same_shaped_matrices_get_independent_noise():
    perturbation, shape = LowRankPerturbation(1, SIGMA), torch.Size([200, 200])
    a, b = (noise_of(perturbation, [Key((0,))], torch.ones(1), Shard(n, torch.zeros(40_000), 0, shape)) for n in "ab")
    assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.1


@pytest.mark.parametrize("kind", ["llama, own head", "gpt2"])
def test_norm_weights_near_1_are_perturbed_in_bfloat16_too(kind):
    """A sigma of 1e-3 is below bfloat16's spacing at 1, so weight plus noise must not be rounded to it."""
    architecture, settings = MODELS[kind]
    exact = LocalEngine(tiny_model(architecture, **settings))
    narrow = LocalEngine(tiny_model(architecture, **settings).bfloat16())
    name = next(n for n in exact.parameters if "norm.weight" in n or "ln_f.weight" in n)
    perturbation, x = LowRankPerturbation(1, 1e-3), torch.ones(6, 5, 32) * torch.tensor([1.0, -1.0]).repeat(16)
    moved = []
    with torch.no_grad():
        for engine in (exact, narrow):
            norm = dict(engine.model.named_modules())[name.removesuffix(".weight")]
            norm.weight.fill_(1.0)
            plain = norm(x.to(norm.weight.dtype)).float()
            with perturbation.perturbed(MemberHooks(engine.model, {name: engine.parameters[name]}), MEMBERS, 6):
                moved.append((norm(x.to(norm.weight.dtype)).float() - plain).abs().mean().item())
    # The output is rounded to bfloat16's spacing at 1 (0.004 below, 0.008 above), so some of it survives, not all.
    assert moved[0] == pytest.approx(1e-3 * (2 / torch.pi) ** 0.5, rel=0.3)
    assert moved[1] > 0


KEYS, COEFFICIENTS = [m.key for m in MEMBERS[::2]], torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)


def update_of(engine, perturbation) -> list[torch.Tensor]:
    return [noise_of(perturbation, KEYS, COEFFICIENTS, shard) for shard in engine.shards(engine.parameters)]


def equal(some, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def close(some, others) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=2e-6) for a, b in zip(some, others, strict=True))


@pytest.fixture
def no_new_noise(monkeypatch):
    """Call it, and noise that was not kept raises."""

    def begin():
        monkeypatch.setattr(low_rank, "gaussian", lambda *args, **kwargs: pytest.fail("noise was drawn again"))

    return begin


@pytest.mark.parametrize("a_forward", [6, 2])
def test_noise_of_an_evaluation_is_kept_for_its_update(a_forward, no_new_noise):
    engine = LocalEngine(tiny_model("gpt2"))
    perturbation = LowRankPerturbation(2, SIGMA, forward_size=ForwardSize(a_forward))
    drawn = update_of(engine, perturbation)
    for _ in range(2):  # the second step finds the first one's memory
        losses_of_members(engine, perturbation, list(engine.parameters), MEMBERS)
    no_new_noise()
    assert close(update_of(engine, perturbation), drawn)
    name, p = next((name, p) for name, p in engine.parameters.items() if p.dim() == 2)
    for start, count in ((0, 5), (40, 70), (64, 96)):
        part = noise_of(perturbation, KEYS, COEFFICIENTS, Shard(name, torch.zeros(count), start, p.shape))
        whole = drawn[list(engine.parameters).index(name)]
        assert torch.allclose(part, whole[start : start + count], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "kept_bytes"),
    [({}, 0), ({}, 100_000), ({"members": 1}, 1 << 28), ({"examples": 1}, 1 << 28)],
    ids=["nothing kept", "some kept", "pairs parted", "micro-batches"],
)
def test_noise_that_is_not_kept_is_drawn_again(settings, kept_bytes, monkeypatch):
    monkeypatch.setattr(drawn_noise, "KEPT_NOISE", kept_bytes)
    engine = LocalEngine(tiny_model("gpt2"))
    perturbation = LowRankPerturbation(2, SIGMA, forward_size=ForwardSize(**settings))
    drawn = update_of(engine, perturbation)
    names = list(engine.parameters)
    for _ in range(2):
        losses = losses_of_members(engine, perturbation, names, MEMBERS)
        assert close(update_of(engine, perturbation), drawn)
    assert torch.allclose(
        losses, losses_of_written_weights(engine, LowRankPerturbation(2, SIGMA), names, MEMBERS), rtol=0, atol=2e-6
    )


def test_an_update_may_be_read_after_other_evaluations():
    """With other keys, of other parameters, or by another estimator on the same model."""
    engine = LocalEngine(tiny_model())
    names = list(engine.parameters)
    perturbation, other = LowRankPerturbation(2, SIGMA), LowRankPerturbation(3, SIGMA)
    drawn, drawn_by_other = update_of(engine, perturbation), update_of(engine, other)
    losses_of_members(engine, perturbation, names, MEMBERS)
    losses_of_members(engine, other, names, MEMBERS)
    assert close(update_of(engine, perturbation), drawn)
    assert close(update_of(engine, other), drawn_by_other)
    later = [Member(m.key.fold("later"), m.sign) for m in MEMBERS]
    losses_of_members(engine, perturbation, names, later)
    assert close(update_of(engine, perturbation), drawn)
    losses_of_members(engine, perturbation, names[:2], MEMBERS)
    assert close(update_of(engine, perturbation), drawn)
    losses_of_members(engine, perturbation, names, MEMBERS[::-1])  # the same noise in another order
    assert close(update_of(engine, perturbation), drawn)


# ---------------------------------------------------------------- what hooks cannot reach


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) * self.scale


class OwnHead(nn.Module):
    """An embedding whose weight is used again, outside its module."""

    def __init__(self, use=lambda weight: weight.T):
        super().__init__()
        self.embed, self.layer, self.use = nn.Embedding(9, 8), nn.Linear(8, 8), use

    def forward(self, ids):
        return torch.tanh(self.layer(self.embed(ids))) @ self.use(self.embed.weight)


class Positions(nn.Module):
    """nanoGPT's way: positions without a dimension for examples."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(6, 4)

    def forward(self, ids):
        return self.words(ids) + self.places(torch.arange(ids.shape[1]))


class Shared(nn.Module):
    """A layer that sees the examples, and then a table of 18 rows: as many as members times examples."""

    def __init__(self):
        super().__init__()
        self.layer, self.table = nn.Linear(8, 8), torch.randn(18, 8)

    def forward(self, x):
        return self.layer(x) + self.layer(self.table)[: x.shape[1]]


class TimeMajor(nn.Module):
    """A layer that sees tokens sorted by time, not by example."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        examples, tokens, features = x.shape
        y = self.layer(x.transpose(0, 1).reshape(-1, features))
        return y.view(tokens, examples, -1).transpose(0, 1)


class Experts(nn.Module):
    """Each expert sees the tokens that are sent to it."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        tokens = x.reshape(-1, 8)
        chosen, result = self.router(tokens).argmax(1), torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            mine = torch.where(chosen == i)[0]
            result.index_copy_(0, mine, expert(tokens[mine]))
        return result.view(x.shape)


IDS = torch.tensor([[1, 5, 2, 0, 7], [8, 3, 3, 1, 2], [4, 0, 6, 6, 5]])
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3))
OUTSIDE = "it is used outside its own module's forward pass"
UNREACHABLE = {
    "own parameter": (Gate, X[..., :4], "scale", "it belongs to a Gate module"),
    "not called": (Gate, X[..., :4], "unused.weight", "the forward pass does not call the module that it belongs to"),
    "lstm": (Recurrent, X, "lstm.weight_hh_l0", "it belongs to a LSTM module"),
    "attention's input": (Attention, X, "in_proj_weight", "it belongs to a Attention module"),
    "attention's output": (Attention, X, "out_proj.weight", OUTSIDE),
    "own head": (OwnHead, IDS, "embed.weight", OUTSIDE),
    "own head, T": (lambda: OwnHead(torch.t), IDS, "embed.weight", OUTSIDE),
    "own head, detached": (lambda: OwnHead(lambda weight: weight.detach().T), IDS, "embed.weight", OUTSIDE),
    "own head, data": (lambda: OwnHead(lambda weight: weight.data.mT), IDS, "embed.weight", OUTSIDE),
    "positions": (Positions, IDS, "places.weight", "its module is called with 5 rows whatever the number of examples"),
    "one position": (Positions, IDS[:, :1], "places.weight", "its module is called with 1 rows"),
    "shared": (Shared, X, "layer.weight", "its module is called with 18 rows whatever the number of examples"),
    "time-major": (TimeMajor, X, "layer.weight", "its module is called with 10 rows that do not come example by example"),
    "experts": (Experts, X, "experts.0.weight", r"its module is called with \d+ rows"),
}  # fmt: skip


def build(kind):
    make, batch, name, reason = UNREACHABLE[kind]
    return make().eval(), batch, name, reason


@pytest.mark.parametrize("kind", UNREACHABLE)
def test_what_hooks_cannot_reach_is_refused_not_skipped(kind):
    model, batch, name, reason = build(kind)
    message = rf"low rank noise cannot be evaluated for parameter {name} because {reason}.*; write in the estimator"
    with pytest.raises(UserError, match=message):
        losses_of_members(LocalEngine(model), LowRankPerturbation(1, SIGMA), [name], MEMBERS, sum_losses, batch)


@pytest.mark.parametrize("kind", UNREACHABLE)
def test_what_hooks_cannot_reach_gets_dense_noise(kind):
    """Evaluated as it is updated; the others stay low rank."""
    model, batch, name, _ = build(kind)
    assert agree(model, sum_losses, batch, otherwise="dense")
    engine, perturbation = LocalEngine(model), LowRankPerturbation(1, SIGMA, otherwise="dense")
    with pytest.warns(RuntimeWarning, match=f"get dense noise, one member a forward pass: .*{name}, because"):
        losses_of_members(engine, perturbation, list(engine.parameters), MEMBERS, sum_losses, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses_of_members(engine, perturbation, list(engine.parameters), MEMBERS, sum_losses, batch)  # said once
    shards = {shard.name: shard for shard in engine.shards(engine.parameters)}
    dense, narrow = DensePerturbation("gaussian", SIGMA), LowRankPerturbation(1, SIGMA)
    found = noise_of(perturbation, KEYS, COEFFICIENTS, shards[name])
    assert torch.equal(found, noise_of(dense, KEYS, COEFFICIENTS, shards[name]))
    if other := next((n for n in ("layer.weight", "head.weight", "words.weight") if n in shards and n != name), None):
        found = noise_of(perturbation, KEYS, COEFFICIENTS, shards[other])
        assert torch.allclose(found, noise_of(narrow, KEYS, COEFFICIENTS, shards[other]), atol=1e-6)


@pytest.mark.parametrize("kind", ["own parameter", "not called", "lstm", "own head", "positions", "shared"])
def test_what_hooks_cannot_reach_is_left_frozen(kind):
    model, batch, name, _ = build(kind)
    engine, perturbation = LocalEngine(model), LowRankPerturbation(1, SIGMA, otherwise="frozen")
    with pytest.warns(RuntimeWarning, match=f"are left frozen: .*{name}, because"):
        found = losses_of_members(engine, perturbation, list(engine.parameters), MEMBERS, sum_losses, batch)
    moved = {s.name for s in engine.shards(engine.parameters) if noise_of(perturbation, KEYS, COEFFICIENTS, s).any()}
    assert name not in moved
    only = losses_of_members(engine, LowRankPerturbation(1, SIGMA), moved, MEMBERS, sum_losses, batch)
    assert same(found, only)
    with torch.no_grad():
        assert ((found - sum_losses(model, batch)).abs().max() > 1e-3) == bool(moved)


def test_dense_and_low_rank_members_see_their_own_examples():
    """With dense noise every forward pass holds one member, whatever is asked for."""
    model, batch, _, _ = build("own head")
    assert agree(model, sum_losses, batch, otherwise="dense", size=ForwardSize(members=4, examples=2))


@pytest.mark.parametrize("otherwise", ["refuse", "dense"])
def test_a_forward_pass_of_one_member_has_no_rows_to_tell_apart(otherwise):
    """Even where a rehearsal finds nothing: the first two examples have as many tokens for each expert, others have not."""
    model, x = Experts(), torch.randn(3, 4, 8)
    with torch.no_grad():
        model.router.weight.copy_(torch.tensor([[1.0], [-1.0]]) * torch.eye(8)[0])
        model.router.bias.zero_()
    x[..., 0] = torch.tensor([[9, 9, -9, -9], [9, 9, -9, -9], [9, 9, 9, -9]])
    names = [f"experts.{i}.{name}" for i in range(2) for name in ("weight", "bias")]
    assert agree(model, sum_losses, x, names, otherwise, size=ForwardSize(members=1))
    with pytest.raises(UserError, match=r"experts.0.weight because its Linear module is called with \d+ rows for 18"):
        agree(model, sum_losses, x, names, size=ForwardSize(members=6))


def test_a_parameter_is_updated_as_it_was_last_evaluated():
    """A batch may call modules that an earlier one did not."""
    model = Gate()
    model.forward = lambda batch: model.unused(batch) if batch.shape[1] == 2 else model.layer(batch)
    engine, perturbation = LocalEngine(model), LowRankPerturbation(1, SIGMA, otherwise="dense")
    with pytest.warns(RuntimeWarning, match=r"unused.weight, because"):
        losses_of_members(engine, perturbation, ["unused.weight"], MEMBERS, sum_losses, X[..., :4])
    arguments = (engine, perturbation, ["unused.weight", "unused.bias"], MEMBERS, sum_losses, X[:, :2, :4])
    assert same(losses_of_members(*arguments), losses_of_written_weights(*arguments))


# ---------------------------------------------------------------- what hooks can reach


@pytest.mark.parametrize("name", ["linear1.weight", "linear2.bias", "norm1.weight", "all"])
def test_torch_encoder_layers_do_not_pass_by_their_modules(name):
    """In evaluation they read weights without calling modules, unless one has a hook."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    names = [n for n, _ in layer.named_parameters() if "attn" not in n] if name == "all" else [name]
    assert agree(layer, sum_losses, X, names)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, LlamaRMSNorm])
def test_norms_and_layers_of_one_row_for_everybody_are_refused(norm):
    """Only lookups of one row are dealt out: what a broadcast does with more rows is the model's own business."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer, self.table = norm(8), nn.Linear(8, 8), X[:1]

        def forward(self, x):
            return x * self.layer(input=self.norm(self.table))

    for name in ("norm.weight", "layer.weight", "layer.bias"):
        with pytest.raises(UserError, match=f"parameter {name} because its module is called with 1 rows whatever"):
            losses_of_members(LocalEngine(Model()), LowRankPerturbation(1, SIGMA), [name], MEMBERS, sum_losses, X)


def test_one_perturbation_may_serve_several_models():
    perturbation = LowRankPerturbation(1, SIGMA)
    for _ in range(2):
        engine = LocalEngine(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
        names = list(engine.parameters)
        found = losses_of_members(engine, perturbation, names, MEMBERS, sum_losses, X)
        written = losses_of_written_weights(engine, perturbation, names, MEMBERS, sum_losses, X)
        assert same(found, written)
