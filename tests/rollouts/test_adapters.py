"""Adapters, as peft loads them, against hooks and against weights that are written out."""

import copy
import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.noise.keys import Key
from hybrid_opt.perturbations.contract import Member
from hybrid_opt.perturbations.factors import active_factors
from hybrid_opt.perturbations.low_rank import LowRankPerturbation
from hybrid_opt.perturbations.member_hooks import MemberHooks
from hybrid_opt.rollouts.adapters import export_adapters, refuse_what_adapters_cannot_carry, why_no_adapter
from tests.conftest import GLASS, tiny_model, token_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to True"
)  # peft knows better where a model has both kinds

SIGMA = 0.05
PAIRS = [Member(Key((0,)).fold(i // 2), 1 if i % 2 == 0 else -1) for i in range(4)]
SINGLES = [Member(Key((1,)).fold(i), 1) for i in range(3)]
CASES = {
    "llama": ("llama", {"tie_word_embeddings": True}, r"proj\.weight$"),
    "llama, own head": ("llama", {"tie_word_embeddings": False, "attention_bias": True}, r"(proj|lm_head)\.weight$"),
    "qwen2": ("qwen2", {}, r"proj\.weight$"),
    "gpt2": ("gpt2", {}, r"(c_attn|c_proj|c_fc)\.weight$"),
    "gpt2, own head": ("gpt2", {"tie_word_embeddings": False}, r"(c_fc|lm_head)\.weight$"),
    "some layers": ("llama", {}, r"layers\.1\.self_attn\.[qv]_proj\.weight$"),
}


def selected(model, pattern):
    return {name: p for name, p in model.named_parameters() if re.search(pattern, name)}


def perturbed(model, parameters, members, rank, rows, sigma=SIGMA):
    """The hooks' context of some members."""
    return LowRankPerturbation(rank, sigma).perturbed(MemberHooks(model, parameters), members, rows)


def export(model, parameters, members, rank, folder, sigma=SIGMA):
    with perturbed(model, parameters, members, rank, len(members), sigma):
        return export_adapters(model, active_factors(), folder)


def adapted(model, path):
    """A copy of the model with an adapter; every tensor of the file must have found its place."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(model), path).eval()
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    stored = load_file(path / "adapter_model.safetensors")
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)
    return model


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("members", [PAIRS, SINGLES], ids=["pairs", "singles"])
@torch.no_grad()
def test_adapters_give_the_logits_of_the_hooks(case, rank, members, tmp_path):
    kind, settings, pattern = CASES[case]
    model = tiny_model(kind, **settings)
    parameters, batch = selected(model, pattern), token_batch()
    repeated = {key: value.repeat(len(members), 1) for key, value in batch.items()}
    with perturbed(model, parameters, members, rank, 3 * len(members)):
        hooked = model(**repeated).logits.unflatten(0, (len(members), 3))
        paths = export_adapters(model, active_factors(), tmp_path)
    plain = model(**batch).logits
    for path, logits in zip(paths, hooked, strict=True):
        with_adapter = adapted(model, path)(**batch).logits
        assert torch.allclose(with_adapter, logits, rtol=0, atol=3e-6 * max(1.0, logits.abs().max().item()))
        assert (logits - plain).abs().max() > 1e-2


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_merged_adapters_are_what_an_update_would_add(case, rank, tmp_path):
    """`w + sign * sigma * noise`, noise from `add_noise`: so a step moves along the very directions that were evaluated."""
    kind, settings, pattern = CASES[case]
    model = tiny_model(kind, **settings)
    parameters, perturbation = selected(model, pattern), LowRankPerturbation(rank, SIGMA)
    shards = {shard.name: shard for shard in LocalEngine(model, device="cpu").shards(parameters)}
    for member, path in zip(PAIRS, export(model, parameters, PAIRS, rank, tmp_path), strict=True):
        merged = dict(adapted(model, path).merge_and_unload().named_parameters())
        for name, p in model.named_parameters():
            noise = torch.zeros(p.numel())
            if name in parameters:
                perturbation.add_noise([member.key], torch.tensor([member.sign * SIGMA]), shards[name], noise)
                assert noise.abs().max() > SIGMA
            assert torch.allclose(merged[name], p + noise.view(p.shape), rtol=0, atol=1e-6), name


def test_a_file_is_what_peft_writes_itself(tmp_path):
    """Same names, shapes, and settings as `save_pretrained` of a model that peft made for the same modules."""
    model = tiny_model("gpt2")
    parameters = selected(model, r"c_fc\.weight$")
    (path, *_) = export(model, parameters, PAIRS, 2, tmp_path)
    targets = ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]
    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM", inference_mode=True
    )
    peft.get_peft_model(tiny_model("gpt2"), config).save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(p / "adapter_model.safetensors") for p in (path, tmp_path / "peft"))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    ours, theirs = (json.loads((p / "adapter_config.json").read_text()) for p in (path, tmp_path / "peft"))
    assert ours.pop("target_modules") == targets
    assert ours.items() <= theirs.items()
    assert sorted(p.name for p in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_bfloat16_keeps_the_factors_that_hooks_use(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    parameters = selected(model, r"q_proj\.weight$")
    with perturbed(model, parameters, PAIRS, 2, 4):
        factors = active_factors()
        paths = export_adapters(model, factors, tmp_path)
    for i, path in enumerate(paths):
        tensors = load_file(path / "adapter_model.safetensors")
        for name in parameters:
            a, b = factors.matrices[name]
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            assert torch.equal(tensors[f"{stem}.lora_A.weight"], a[i // 2])
            expected = (PAIRS[i].sign * SIGMA * b[i // 2].mT.float()).bfloat16()
            assert torch.equal(tensors[f"{stem}.lora_B.weight"], expected)


@torch.no_grad()
def test_a_pretrained_model_writes_the_same_text(tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(GLASS).eval(), AutoTokenizer.from_pretrained(GLASS)
    ids = tokenizer("It is a truth universally", return_tensors="pt")["input_ids"]
    parameters = selected(model, r"layers.*(proj|fc|c_\w+|dense)\w*\.weight$")
    arguments = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    with perturbed(model, parameters, PAIRS, 1, 4, sigma=0.03):
        together = model.generate(input_ids=ids.repeat(4, 1), **arguments)
        paths = export_adapters(model, active_factors(), tmp_path)
    alone = torch.cat([adapted(model, path).generate(input_ids=ids, **arguments) for path in paths])
    assert torch.equal(together, alone)
    assert len({tuple(row) for row in alone.tolist()}) > 2


class Shared(nn.Module):
    """A linear weight with two owners, in modules whose names end alike."""

    def __init__(self):
        super().__init__()
        self.a, self.block = nn.Linear(8, 8, bias=False), nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        self.block.b.weight = self.a.weight

    def forward(self, x):
        return self.block.a(self.a(x)) + self.block.b(x)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # of block.a, where peft's start is no change
@torch.no_grad()
def test_a_weight_of_two_modules_gets_its_noise_in_both(tmp_path):
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(3, 8)
    parameters = {"a.weight": model.a.weight}
    with perturbed(model, parameters, PAIRS, 2, 12):
        hooked = model(x.repeat(4, 1)).view(4, 3, 8)
        paths = export_adapters(model, active_factors(), tmp_path)
    for path, expected in zip(paths, hooked, strict=True):
        config = json.loads((path / "adapter_config.json").read_text())
        assert config["target_modules"] == ["a", "block.b"]
        (path / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}))  # it generates no text
        with_adapter = peft.PeftModel.from_pretrained(copy.deepcopy(model), path)
        assert torch.allclose(with_adapter(x), expected, rtol=0, atol=2e-6)


# ---------------------------------------------------------------- what adapters cannot carry

REFUSED = {
    "embedding, tied": ("llama", {"tie_word_embeddings": True}, r"embed_tokens|q_proj", "model.embed_tokens.weight", "Embedding"),
    "embedding": ("llama", {"tie_word_embeddings": False}, r"embed_tokens|lm_head", "model.embed_tokens.weight", "Embedding"),
    "norm": ("llama", {}, r"proj|post_attention_layernorm", "model.layers.0.post_attention_layernorm.weight", "LlamaRMSNorm"),
    "bias": ("qwen2", {}, r"v_proj", "model.layers.0.self_attn.v_proj.bias", "the bias of a Linear"),
    "bias of Conv1D": ("gpt2", {}, r"mlp\.c_fc", "transformer.h.0.mlp.c_fc.bias", "the bias of a Conv1D"),
    "positions": ("gpt2", {}, r"wpe|c_fc\.weight", "transformer.wpe.weight", "Embedding"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_noise_is_refused_and_nothing_is_written(case, tmp_path):
    kind, settings, pattern, name, reason = REFUSED[case]
    model = tiny_model(kind, **settings)
    with pytest.raises(UserError, match=f"carry the noise of parameter {re.escape(name)}.* because it .*{reason}"):
        export(model, selected(model, pattern), PAIRS, 1, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "opt", "mistral"])
def test_the_policy_line_that_is_offered_freezes_just_what_is_refused(kind):
    model = tiny_model(kind)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError) as error:
        refuse_what_adapters_cannot_carry(model, names)
    pattern = re.search(r"\{match: '(.*?)', use: frozen\}", str(error.value))[1]
    found = {name for name in names if re.search(pattern, name)}
    assert found == why_no_adapter(model, names).keys()
    assert found < set(names)
    refuse_what_adapters_cannot_carry(model, set(names) - found)
    assert all(p.dim() == 2 for name, p in model.named_parameters() if name not in found)


def test_a_pattern_never_freezes_more_than_is_refused():
    """Two modules with the same last names, one of which has an adapter and one not."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.ModuleDict({"table": nn.Embedding(4, 4)})
            self.other = nn.ModuleDict({"table": nn.Linear(4, 4, bias=False)})

    with pytest.raises(UserError, match=re.escape(r"{match: '^(one\.table\.weight)$', use: frozen}")):
        refuse_what_adapters_cannot_carry(Model(), ["one.table.weight", "other.table.weight"])


def test_no_noise_at_all_and_adapters_of_adapters_are_refused():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="policy: no parameter gets noise"):
        refuse_what_adapters_cannot_carry(model, [])
    with_adapters = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    names = [name for name, p in with_adapters.named_parameters() if p.requires_grad]
    with pytest.raises(UserError, match=r"peft: .* drop the peft section"):
        refuse_what_adapters_cannot_carry(with_adapters, names)
