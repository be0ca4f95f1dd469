"""The vLLM rollout against generation under hooks, with a stand-in for vLLM that loads the folders it is given by transformers and peft."""

import gc
import sys
import tempfile
from pathlib import Path

import peft
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_opt.config.probing import EvolutionStrategy
from hybrid_opt.config.rewards import Generation
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.es import EsEstimator
from hybrid_opt.noise.keys import Key
from hybrid_opt.objectives.language_model import left_padded
from hybrid_opt.perturbations.contract import Member
from hybrid_opt.perturbations.dense import DensePerturbation
from hybrid_opt.perturbations.factors import active_factors
from hybrid_opt.perturbations.low_rank import LowRankPerturbation
from hybrid_opt.perturbations.member_hooks import MemberHooks
from hybrid_opt.rollouts import served_weights
from hybrid_opt.rollouts.served_weights import checksum
from hybrid_opt.rollouts.vllm import VllmRollout
from tests.conftest import GLASS, tiny_model
from tests.rollouts import fake_vllm

MEMBERS = [Member(Key((0,)).fold(i // 2), 1 if i % 2 == 0 else -1) for i in range(4)]
OTHERS = [Member(Key((7,)).fold(i), 1) for i in range(3)]
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14]]
FLOAT32 = {"dtype": "float32"}
SIGMA = 0.1


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """The stand-in's `LLM`; every temporary folder comes into `tmp_path`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(served_weights, "SHARED_MEMORY", tmp_path / "none")
    return fake_vllm.install(monkeypatch)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GLASS)


def rollout_of(tokenizer, *, engine_arguments=FLOAT32, **settings):
    config = {"max_new_tokens": 6, "engine": "vllm", "engine_arguments": engine_arguments, **settings}
    return VllmRollout(Generation(**config), tokenizer)


def model_and_parameters(kind="llama", ends=2):
    """A model whose linear layers get noise."""
    model = tiny_model(kind, eos_token_id=ends)
    model.generation_config.eos_token_id = ends
    return model, {name: p for name, p in model.named_parameters() if "proj.weight" in name}


def perturbed(model, parameters, members, rows, rank=2, sigma=SIGMA):
    return LowRankPerturbation(rank, sigma).perturbed(MemberHooks(model, parameters), members, rows)


def batch_of(prompts, members=1, **more):
    batch = {key: value.repeat(members, 1) for key, value in left_padded(prompts, 0).items()}
    return {**batch, **more}


@torch.no_grad()
def generated(model, batch, tokens=6, ends=(2, 3)):
    """What the model writes by itself, each row without its end; 2 is the model's, 3 the tokenizer's."""
    rows = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=list(ends),
    )[:, batch["input_ids"].shape[1] :].tolist()
    at = [next((i for i, token in enumerate(row) if token in ends), None) for row in rows]
    return [row[:i] for row, i in zip(rows, at, strict=True)], [i is not None for i in at]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_completions_are_those_of_the_hooks(kind, engine, tokenizer):
    model, parameters = model_and_parameters(kind)
    rollout, batch = rollout_of(tokenizer), batch_of(PROMPTS, len(MEMBERS))
    with perturbed(model, parameters, MEMBERS, 12):
        expected, _ = generated(model, batch)
        found = rollout.complete(model, batch)
    assert found.tokens == expected
    assert len({tuple(row) for row in found.tokens[::3]}) > 2
    plain = rollout.complete(model, batch_of(PROMPTS))
    assert plain.tokens == generated(model, batch_of(PROMPTS))[0]
    assert plain.tokens != expected[:3]
    assert engine.started[0].requests is None


def test_prompts_are_ids_without_padding_and_adapters_come_member_major(engine, tokenizer):
    model, parameters = model_and_parameters()
    rollout = rollout_of(tokenizer)
    with perturbed(model, parameters, MEMBERS, 12):
        rollout.complete(model, batch_of(PROMPTS, 4))
    (llm,) = engine.started
    assert llm.prompts == [{"prompt_token_ids": ids} for ids in PROMPTS * 4]
    assert [r.lora_int_id for r in llm.requests] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert len({r.lora_name for r in llm.requests}) == 4


def test_a_token_like_the_padding_inside_a_prompt_stays(engine, tokenizer):
    model, _ = model_and_parameters()
    rollout_of(tokenizer).complete(model, batch_of([[0, 3, 0], [4, 5, 6, 7]]))
    assert engine.started[0].prompts == [{"prompt_token_ids": [0, 3, 0]}, {"prompt_token_ids": [4, 5, 6, 7]}]


def test_the_end_of_text_is_left_out_and_told(engine, tokenizer):
    model, parameters = model_and_parameters()
    with perturbed(model, parameters, MEMBERS, 12):
        batch = batch_of(PROMPTS, 4)
        long = [row for row in generated(model, batch)[0] if len(row) == 6]
        ends = [long[0][2], long[-1][0]]  # tokens that some rows come to
        model.generation_config.eos_token_id = ends
        expected, finished = generated(model, batch, ends=(*ends, 3))
        found = rollout_of(tokenizer).complete(model, batch)
    assert (found.tokens, found.finished) == (expected, finished)
    assert 0 < sum(finished) < 12
    assert [] in found.tokens


def test_stop_strings_and_options_reach_vllm(engine, tokenizer):
    model, _ = model_and_parameters()
    first = generated(model, batch_of(PROMPTS))[0][2]
    assert len(first) == 6
    stop = tokenizer.decode(first[:2])
    found = rollout_of(tokenizer, stop=[stop]).complete(model, batch_of(PROMPTS[2:]))
    assert found.finished == [True]
    assert found.tokens == [first[:2]]
    rollout_of(tokenizer, temperature=0.7, top_k=5, top_p=0.9).complete(model, batch_of(PROMPTS))
    params = engine.started[1].params[0]
    assert (params.temperature, params.top_k, params.top_p, params.detokenize) == (0.7, 5, 0.9, False)
    assert params.stop_token_ids == [2, 3]
    assert engine.started[0].params[0].top_k == 0


# ---------------------------------------------------------------- random numbers


def test_members_share_random_numbers(engine, tokenizer):
    model, parameters = model_and_parameters()
    rollout = rollout_of(tokenizer, temperature=1.5)
    with perturbed(model, parameters, MEMBERS, 12, sigma=1e-7):  # members that are all but equal write the same
        unseeded = rollout.complete(model, batch_of(PROMPTS, 4))
        assert [p.seed for p in engine.started[0].params] == [0, 1, 2] * 4
        seeds = torch.tensor([2**62 + 5, 9, -1]).repeat(4)
        seeded = rollout.complete(model, batch_of(PROMPTS, 4, seeds=seeds))
        assert [p.seed for p in engine.started[0].params] == [2**62 + 5, 9, 2**63 - 1] * 4
        alone = rollout.complete(model, batch_of(PROMPTS[1:2], 4, seeds=seeds[1::3]))
    for found in (unseeded, seeded):
        assert found.tokens[:3] * 4 == found.tokens
    assert unseeded.tokens != seeded.tokens
    assert alone.tokens == seeded.tokens[1::3]  # whatever other rows there are


def test_the_likeliest_tokens_need_no_seed(engine, tokenizer):
    model, _ = model_and_parameters()
    rollout_of(tokenizer).complete(model, batch_of(PROMPTS, seeds=torch.tensor([1, 2, 3])))
    assert [p.seed for p in engine.started[0].params] == [None] * 3


# ---------------------------------------------------------------- weights


def test_weights_are_handed_over_when_they_have_changed_and_only_then(engine, tokenizer):
    model, parameters = model_and_parameters()
    rollout, batch = rollout_of(tokenizer), batch_of(PROMPTS)

    def found():
        with perturbed(model, parameters, MEMBERS, 12):
            rollout.complete(model, batch_of(PROMPTS, 4))
        return rollout.complete(model, batch).tokens

    first = found()
    (llm,) = engine.started
    assert found() == first
    assert llm.calls == ["generate"] * 4
    with torch.no_grad():
        for p in parameters.values():
            p.data.add_(
                0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
            )  # the counter of `p` stays
    second = found()
    assert second == generated(model, batch)[0] != first
    assert llm.calls[4:] == ["reload", "reset_prefix_cache", "generate", "generate"]
    assert [len(engine.started), llm.calls.count("reload")] == [1, 1]


def test_weights_that_failed_to_arrive_are_handed_over_again(engine, tokenizer, monkeypatch):
    model, _ = model_and_parameters()
    rollout, batch = rollout_of(tokenizer), batch_of(PROMPTS)
    rollout.complete(model, batch)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "collective_rpc", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rollout.complete(model, batch)
    assert rollout.complete(model, batch).tokens == generated(model, batch)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_tells_any_change_of_one_weight_and_any_order(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.Linear(3, 1)).to(dtype)  # two blocks
    seen, weights = {checksum(model)}, model[0].weight.data.view(-1)
    assert checksum(model) in seen
    for i in (0, 1, 2**18 - 1, 2**18, len(weights) - 1):  # the last bit of a weight, the first and last of a block
        bits = weights[i : i + 1].view(torch.int32 if dtype == torch.float32 else torch.int16)
        bits ^= 1
        seen.add(checksum(model))
        bits ^= 1
    for other in (weights.roll(1), weights.roll(2**18), weights.flip(0), -weights):
        kept = weights.clone()
        weights.copy_(other)
        seen.add(checksum(model))
        weights.copy_(kept)
    assert len(seen) == 10
    assert checksum(model) in seen


# ---------------------------------------------------------------- folders


def test_adapters_lie_in_a_folder_as_long_as_their_members_are_evaluated(engine, tokenizer, tmp_path):
    model, parameters = model_and_parameters()
    rollout = rollout_of(tokenizer)

    def adapters():
        return sorted(str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("adapter_model.safetensors"))

    with perturbed(model, parameters, MEMBERS, 12):
        rollout.complete(model, batch_of(PROMPTS, 4))
        first = adapters()
        rollout.complete(model, batch_of(PROMPTS[:1], 4))  # more examples of the same members
        assert adapters() == first
    assert [len(first), engine.started[0].requests[-1].lora_int_id] == [4, 4]
    gc.collect()
    assert not adapters()
    with perturbed(model, parameters, OTHERS, 9):
        other = rollout.complete(model, batch_of(PROMPTS, 3))
        assert other.tokens == generated(model, batch_of(PROMPTS, 3))[0]  # and not what known ids would give
        assert [r.lora_int_id for r in engine.started[0].requests[::3]] == [5, 6, 7]
    assert not list(tmp_path.rglob("model.safetensors"))  # weights are gone as soon as vLLM has them
    rollout.close()
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_nothing_stays_behind_after_an_error(engine, tokenizer, tmp_path):
    model, parameters = model_and_parameters()
    rollout = rollout_of(tokenizer)
    norms = {name: p for name, p in model.named_parameters() if "layernorm" in name}
    with (
        pytest.raises(
            UserError, match=r"noise of parameter model.layers.0.input_layernorm.weight \(nor those of 3 others\)"
        ),
        perturbed(model, parameters | norms, MEMBERS, 12),
    ):
        rollout.complete(model, batch_of(PROMPTS, 4))
    rollout.close()
    del rollout
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_shared_memory_is_used_if_there_is_room(monkeypatch, tmp_path):
    monkeypatch.setattr(served_weights, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    with served_weights.new_folder(1) as place:
        assert Path(place).parent == tmp_path
    with served_weights.new_folder(1 << 60) as place:
        assert Path(place).parent == tmp_path / "elsewhere"


# ---------------------------------------------------------------- a step of ES


class TokenCount:
    """How often a token is written, as a loss; ES must move the same way whoever writes."""

    differentiable = False

    def __init__(self, rollout):
        self.rollout = rollout

    def losses(self, model, batch):
        if active_factors() is None or self.rollout is None:  # a rehearsal is about the model's own passes
            rows, _ = generated(model, batch)
        else:
            rows = self.rollout.complete(model, batch).tokens
        return torch.tensor([float(sum(token < 32 for token in row)) for row in rows])


@pytest.mark.parametrize("members_per_forward", [2, 8])
def test_a_step_moves_along_the_same_direction(engine, tokenizer, members_per_forward):
    model, parameters = model_and_parameters()
    local, batch = LocalEngine(model, device="cpu"), batch_of(PROMPTS)
    config = EvolutionStrategy(
        type="es", population_size=8, sigma=SIGMA, learning_rate=0.1, members_per_forward=members_per_forward
    )
    estimates = [
        EsEstimator(config).estimate(local, TokenCount(rollout), batch, list(parameters), Key((3,)))
        for rollout in (None, rollout_of(tokenizer))
    ]
    (own, own_cost), (served, served_cost) = estimates
    assert torch.equal(own.coefficients, served.coefficients)
    assert own_cost.loss == served_cost.loss
    assert own.coefficients.abs().max() > 0
    for shard in local.shards(parameters):
        assert torch.equal(own.read(shard), served.read(shard))
    (llm,) = engine.started
    assert llm.calls.count("generate") == 8 // members_per_forward


# ---------------------------------------------------------------- starting, sleeping, refusing


def test_arguments_of_vllm(engine, tokenizer):
    model, parameters = model_and_parameters()
    rollout_of(tokenizer, engine_arguments={**FLOAT32, "max_loras": 3}).complete(model, batch_of(PROMPTS))
    with perturbed(model, parameters, MEMBERS, 12, rank=9):
        rollout_of(tokenizer).complete(model, batch_of(PROMPTS, 4))
    first, second = (llm.arguments for llm in engine.started)
    assert first == {
        "max_lora_rank": 8,
        "max_loras": 3,
        "dtype": "float32",
        "enable_lora": True,
        "gpu_memory_utilization": 0.5,
    }
    assert (second["max_lora_rank"], second["max_loras"]) == (16, 8)


def test_a_model_in_bfloat16_is_served_in_it_and_one_in_float32_is_refused(engine, tokenizer):
    model, _ = model_and_parameters()
    with pytest.raises(UserError, match=r"model.dtype: .* is in float32; write dtype: bfloat16, or engine_arguments"):
        rollout_of(tokenizer, engine_arguments={}).complete(model, batch_of(PROMPTS))
    assert not engine.started
    rollout_of(tokenizer, engine_arguments={}).complete(model.to(torch.bfloat16), batch_of(PROMPTS))
    assert engine.started[0].model.dtype == torch.bfloat16


def test_it_sleeps_between_turns_if_it_may(engine, tokenizer):
    model, _ = model_and_parameters()
    rollout = rollout_of(tokenizer, engine_arguments={**FLOAT32, "enable_sleep_mode": True})
    for sign in (1, 1, -1):
        with torch.no_grad():
            model.lm_head.weight.mul_(sign)
        rollout.complete(model, batch_of(PROMPTS))
    turn = ["generate", "sleep", "wake_up"]
    assert engine.started[0].calls == [*turn, *turn, "reload", "reset_prefix_cache", "generate", "sleep"]


def test_a_rank_beyond_what_vllm_was_started_for(engine, tokenizer):
    model, parameters = model_and_parameters()
    rollout = rollout_of(tokenizer)
    rollout.complete(model, batch_of(PROMPTS))
    with (
        perturbed(model, parameters, MEMBERS, 12, rank=20),
        pytest.raises(UserError, match=r"max_lora_rank: .* rank 8 at most, but noise_rank is 20; write 32"),
    ):
        rollout.complete(model, batch_of(PROMPTS, 4))


def test_what_vllm_says_when_it_does_not_start_is_passed_on(engine, tokenizer):
    model, _ = model_and_parameters()
    rollout = rollout_of(tokenizer, engine_arguments={**FLOAT32, "max_lorass": 3})
    with pytest.raises(UserError, match=r"vLLM does not start with .*engine_arguments: .*'max_lorass'"):
        rollout.complete(model, batch_of(PROMPTS))


@torch.no_grad()
def test_dense_noise_is_refused_where_vllm_would_not_see_it_and_right_where_it_does(engine, tokenizer):
    model, parameters = model_and_parameters()
    rollout, batch, member = rollout_of(tokenizer), batch_of(PROMPTS), MEMBERS[0]
    with (
        DensePerturbation("gaussian", SIGMA).perturbed(model, parameters, member),
        pytest.raises(UserError, match=r"dense noise exists only while .* backup: model"),
    ):
        rollout.complete(model, batch)
    with DensePerturbation("gaussian", SIGMA, whole_model=True).perturbed(model, parameters, member):
        expected, found = generated(model, batch)[0], rollout.complete(model, batch).tokens
    assert found == expected != generated(model, batch)[0]
    assert rollout.complete(model, batch).tokens == generated(model, batch)[0]


def test_a_population_with_some_dense_noise_is_refused(engine, tokenizer):
    """`otherwise: dense` under hooks: the adapters would carry only a part of each member."""
    model = tiny_model()
    norm = model.model.norm

    class Scaled(type(norm)):
        def forward(self, x):
            return super().forward(x) * self.gain

    norm.__class__, norm.gain = Scaled, torch.nn.Parameter(torch.ones(32))
    local = LocalEngine(model, device="cpu")
    perturbation = LowRankPerturbation(1, SIGMA, otherwise="dense")
    objective = TokenCount(rollout_of(tokenizer))
    names = [name for name in local.parameters if "proj.weight" in name] + ["model.norm.gain"]
    with (
        pytest.warns(RuntimeWarning, match="model.norm.gain, because it belongs to a Scaled module"),
        pytest.raises(UserError, match="dense noise exists only while"),
    ):
        perturbation.evaluate(local, objective, batch_of(PROMPTS), names, MEMBERS, torch.arange(3).expand(4, 3))


def test_adapters_of_adapters_and_several_processes_are_refused(engine, tokenizer, monkeypatch):
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="drop the peft section"):
        rollout_of(tokenizer).complete(model, batch_of(PROMPTS))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a run of one process"):
        rollout_of(tokenizer)


def test_without_vllm_it_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install 'hybrid-opt\[vllm\]'"):
        rollout_of(tokenizer)


@pytest.mark.parametrize("name", ["model", "tokenizer", "enable_lora"])
def test_arguments_that_follow_from_the_run_are_refused(name):
    with pytest.raises(ValidationError, match=f"engine_arguments.{name} follows from the model section"):
        Generation(engine="vllm", engine_arguments={name: "x"})


def test_a_pretrained_model_token_for_token(engine, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(GLASS).eval()
    parameters = {n: p for n, p in model.named_parameters() if "layers" in n and p.dim() == 2}
    batch = batch_of(tokenizer(["It is a truth universally", "She was"])["input_ids"], 4)
    rollout = rollout_of(tokenizer, max_new_tokens=16)
    ends = [tokenizer.eos_token_id]
    with perturbed(model, parameters, MEMBERS, 8, sigma=0.03):
        assert rollout.complete(model, batch).tokens == generated(model, batch, 16, ends)[0]
