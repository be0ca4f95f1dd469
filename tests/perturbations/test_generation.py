"""Generation with a key-value cache, each row with its own member's weights, against weights that are written out."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.noise.keys import Key
from hybrid_opt.perturbations.contract import Member
from hybrid_opt.perturbations.low_rank import LowRankPerturbation
from hybrid_opt.perturbations.member_hooks import MemberHooks
from tests.conftest import GLASS, tiny_model

MEMBERS = [Member(Key((0,)).fold(i // 2), 1 if i % 2 == 0 else -1) for i in range(4)]


def generate(model, ids, mask, tokens):
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )[:, ids.shape[1] :]


@torch.no_grad()
def together_and_alone(model, ids, mask, sigma, tokens=12):
    """New tokens (members, prompts, tokens): of one generation under hooks, and of one for each member's own weights."""
    engine, perturbation = LocalEngine(model, device="cpu"), LowRankPerturbation(2, sigma)
    rows = len(MEMBERS) * len(ids)
    hooks = MemberHooks(model, engine.parameters)
    with perturbation.perturbed(hooks, MEMBERS, rows):
        repeated = (x.repeat(len(MEMBERS), 1) for x in (ids, mask))
        together = generate(model, *repeated, tokens).view(len(MEMBERS), len(ids), tokens)
    alone = []
    for member in MEMBERS:
        before = {name: p.data.clone() for name, p in engine.parameters.items()}
        for shard in engine.shards(engine.parameters):
            perturbation.add_noise([member.key], torch.tensor([member.sign * sigma]), shard, shard.data)
        alone.append(generate(model, ids, mask, tokens))
        for name, p in engine.parameters.items():
            p.data.copy_(before[name])
    return together, torch.stack(alone)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3_text", "gpt2", "opt"])
def test_each_row_is_written_by_its_own_member(kind):
    model = tiny_model(kind)
    ids = torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 3)):  # padded on the left
        ids[row, :padding], mask[row, :padding] = 0, 0
    together, alone = together_and_alone(model, ids, mask, sigma=0.1)
    assert torch.equal(together, alone)
    texts = {tuple(row.tolist()) for row in alone[:, 0]} | {tuple(generate(model, ids, mask, 12)[0].tolist())}
    assert len(texts) > 2  # members do write other texts than each other and the plain model


def test_a_pretrained_model_too():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(GLASS).eval(), AutoTokenizer.from_pretrained(GLASS)
    texts = ["It is a truth universally", "She was"]
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together, alone = together_and_alone(model, batch["input_ids"], batch["attention_mask"], sigma=0.01, tokens=16)
    assert torch.equal(together, alone)
    assert not torch.equal(alone[0], alone[1])
