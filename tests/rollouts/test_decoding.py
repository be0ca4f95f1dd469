"""Completions token for token against transformers' own generation, with members, shrinking batches and shared reading."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_opt.config.rewards import Generation
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.noise.keys import Key
from hybrid_opt.objectives.language_model import left_padded
from hybrid_opt.perturbations.contract import Member
from hybrid_opt.perturbations.factors import active_factors
from hybrid_opt.perturbations.low_rank import LowRankPerturbation
from hybrid_opt.perturbations.member_hooks import MemberHooks
from hybrid_opt.rollouts.choosing import build_choice
from hybrid_opt.rollouts.decoding import Decoding
from tests.conftest import GLASS, tiny_model

TOKENIZER = AutoTokenizer.from_pretrained(GLASS)
MEMBERS = [Member(Key((0,)).fold(i // 2), 1 if i % 2 == 0 else -1) for i in range(4)]
PROMPTS = [[5, 9, 14, 20, 33], [7, 7], [11, 40, 2, 8, 50, 3, 17]]
INSTRUCTED = [[4, 8, 15, 16, 23, 42] * 3 + prompt[:2] for prompt in PROMPTS]
KINDS = ["llama", "mistral", "qwen3", "gemma3_text", "gpt2", "opt"]


def plain(model, prompts, most):
    """What `generate` writes for each prompt alone, up to its first end-of-text token."""
    ends = model.generation_config.eos_token_id
    ends = {TOKENIZER.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        new = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0)
        new = new[0, len(prompt) :].tolist()
        texts.append(new[: next((i for i, t in enumerate(new) if t in ends), len(new))])
    return texts


class PassSizes:
    """Counts the rows that a module sees in each pass."""

    def __init__(self, module: nn.Module):
        self.rows: list[int] = []
        module.register_forward_pre_hook(lambda _, args, kwargs: self.rows.append(len(args[0])), with_kwargs=True)


def together(model, prompts, sigma, names=None, **generation):
    """Completions (members, prompts) of one generation under hooks, twice: the second knows which layers members share."""
    engine = LocalEngine(model, device="cpu")
    parameters = {n: p for n, p in engine.parameters.items() if names is None or names in n}
    perturbation, hooks = LowRankPerturbation(2, sigma), MemberHooks(model, parameters)
    decoding = Decoding(Generation(**generation), TOKENIZER)
    batch = left_padded(prompts * len(MEMBERS), 0)
    results = []
    for _ in range(2):
        with perturbation.perturbed(hooks, MEMBERS, len(batch["input_ids"])):
            tokens = decoding.complete(model, batch).tokens
            assert active_factors().rows == len(batch["input_ids"])
        results.append([tokens[i : i + len(prompts)] for i in range(0, len(tokens), len(prompts))])
    assert results[0] == results[1]
    return results[0]


def alone(model, prompts, sigma, most, names=None):
    """The same from weights that are written out, one member and one prompt at a time."""
    engine, perturbation = LocalEngine(model, device="cpu"), LowRankPerturbation(2, sigma)
    texts = []
    for member in MEMBERS:
        before = {name: p.data.clone() for name, p in engine.parameters.items()}
        for shard in engine.shards([n for n in engine.parameters if names is None or names in n]):
            perturbation.add_noise([member.key], torch.tensor([member.sign * sigma]), shard, shard.data)
        texts.append(plain(model, prompts, most))
        for name, p in engine.parameters.items():
            p.data.copy_(before[name])
    return texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompts", [PROMPTS, INSTRUCTED], ids=["different", "beginning in common"])
def test_each_member_writes_what_its_own_weights_would(kind, prompts):
    model = tiny_model(kind)
    found = together(model, prompts, 0.1, max_new_tokens=10)
    assert found == alone(model, prompts, 0.1, 10)
    assert len({tuple(map(tuple, texts)) for texts in found}) > 1


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("prompts", [PROMPTS, INSTRUCTED], ids=["different", "beginning in common"])
def test_members_share_the_layers_below_all_noise(kind, prompts):
    model = tiny_model(kind)
    names = {"llama": "layers.1", "qwen3": "layers.1.mlp", "gpt2": "h.1", "opt": "layers.1"}[kind]
    first = next(m for n, m in model.named_modules() if n.endswith(("layers.0", "h.0")))
    sizes = PassSizes(first)
    found = together(model, prompts, 0.3, names, max_new_tokens=6)
    prefills = [rows for rows in sizes.rows if rows in (1, len(prompts))]
    assert prefills == ([1, len(prompts)] if prompts is INSTRUCTED else [len(prompts)])
    assert found == alone(model, prompts, 0.3, 6, names)


def test_a_noisy_head_parts_members_after_the_last_layer():
    model = tiny_model("llama")
    assert together(model, PROMPTS, 1.0, "lm_head", max_new_tokens=6) == alone(model, PROMPTS, 1.0, 6, "lm_head")


def test_finished_rows_leave_the_batch():
    model = AutoModelForCausalLM.from_pretrained(GLASS).eval()
    prompts = TOKENIZER(["She was", "It is a truth", "Alice said", "The end of", "“I", "off with her"]).input_ids
    sizes = PassSizes(model.model.layers[0])
    completions = Decoding(Generation(max_new_tokens=24, stop=[",", "."]), TOKENIZER).complete(
        model, left_padded(prompts, 0)
    )
    passes = list(sizes.rows)
    expected = plain(model, prompts, 24)
    for tokens, whole, finished in zip(completions.tokens, expected, completions.finished, strict=True):
        assert tokens == whole[: len(tokens)]
        text, before = TOKENIZER.decode(tokens), TOKENIZER.decode(tokens[:-1])
        assert finished == ("," in text or "." in text)
        assert "," not in before
        assert "." not in before
        assert finished or len(tokens) == 24
    assert any(completions.finished)
    lengths = [len(tokens) for tokens in completions.tokens]
    # A row takes part in a pass for each of its tokens but the last, whose successor nobody wants.
    assert passes == [6] + [sum(n > done for n in lengths) for done in range(1, max(lengths))]


def test_the_end_of_text_token_is_no_part_of_a_completion():
    model = tiny_model("llama")
    unlimited = plain(model, PROMPTS, 10)
    model.generation_config.eos_token_id = [unlimited[0][3], unlimited[1][0]]  # several, as chat models have
    found = Decoding(Generation(max_new_tokens=10), TOKENIZER).complete(model, left_padded(PROMPTS, 0))
    assert list(found.tokens) == plain(model, PROMPTS, 10)
    assert found.tokens[1] == []
    assert found.finished == [len(tokens) < 10 for tokens in found.tokens]


# ---------------------------------------------------------------- sampling


def sampled(model, prompts, seeds, **options):
    decoding = Decoding(Generation(max_new_tokens=8, **options), TOKENIZER)
    return decoding.complete(model, {**left_padded(prompts, 0), "seeds": torch.tensor(seeds)}).tokens


def test_what_is_sampled_depends_on_the_seed_and_on_nothing_else():
    model = tiny_model("llama")
    texts = sampled(model, PROMPTS, [3, 4, 5], temperature=1.0)
    assert [sampled(model, [p], [s], temperature=1.0)[0] for p, s in zip(PROMPTS, [3, 4, 5], strict=True)] == texts
    assert sampled(model, PROMPTS, [5, 4, 3], temperature=1.0)[1] == texts[1]
    assert sampled(model, PROMPTS, [6, 7, 8], temperature=1.0) != texts


def test_equal_rows_of_different_members_have_their_luck_in_common():
    model = tiny_model("llama")
    texts = sampled(model, [PROMPTS[0]] * 4, [1, 1, 2, 2], temperature=1.0)
    assert texts[0] == texts[1] != texts[2] == texts[3]


def test_samples_are_distributed_as_the_probabilities_say():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    rows = 4000
    for options, kept in (({}, 4), ({"top_k": 2}, 2), ({"top_p": 0.6}, 1)):
        choose = build_choice(Generation(temperature=0.5, **options), torch.arange(rows), torch.device("cpu"))
        tokens = choose(logits.expand(rows, -1), torch.arange(rows))
        best = (logits / 0.5).topk(kept)
        expected = torch.zeros(4).scatter_(0, best.indices[0], best.values[0].softmax(0))
        error = 4 * (expected * (1 - expected) / rows).sqrt() + 1e-9
        assert ((tokens.bincount(minlength=4) / rows - expected).abs() <= error).all()
