"""Where weights come from."""

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from hybrid_opt.config.run import Lora, Model
from hybrid_opt.errors import UserError
from hybrid_opt.models.loading import load_model, load_tokenizer
from tests.conftest import GLASS, TINY

KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2"])
ADAPTED = Model(name=str(GLASS))


def random_model(kind: str = "llama", dtype: str = "float32", **settings) -> Model:
    return Model(config={"model_type": kind, **TINY[kind], **settings}, tokenizer=str(GLASS), dtype=dtype)


def weights(config: Model, seed: int, lora: Lora | None = None) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in load_model(config, lora, seed).named_parameters()}


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@KINDS
def test_random_weights_are_a_function_of_the_seed(kind):
    torch.manual_seed(1)
    first = weights(random_model(kind), 3)
    torch.manual_seed(2)
    assert_equal(weights(random_model(kind), 3), first)
    other = weights(random_model(kind), 4)
    matrices = [name for name in first if first[name].dim() == 2]
    assert len(matrices) >= 8
    for name in matrices:
        assert abs(torch.corrcoef(torch.stack([first[name].flatten(), other[name].flatten()]))[0, 1]) < 0.2, name


@pytest.mark.parametrize("lora", [None, Lora()], ids=["full", "lora"])
@pytest.mark.parametrize("config", [random_model(), ADAPTED], ids=["random", "folder"])
def test_torchs_own_generator_is_left_alone(config, lora):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_model(config, lora, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("config", [random_model(), ADAPTED], ids=["random", "folder"])
def test_adapters_are_a_function_of_the_seed(config):
    torch.manual_seed(1)
    first = weights(config, 3, Lora())
    torch.manual_seed(2)
    assert_equal(weights(config, 3, Lora()), first)
    other = weights(config, 4, Lora())
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


def test_adapters_change_nothing_at_first_and_leave_the_rest_frozen():
    plain, adapted = load_model(ADAPTED, None, 0), load_model(ADAPTED, Lora(r=2), 0)
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(adapted.eval()(tokens).logits, plain.eval()(tokens).logits)
    assert all(p.requires_grad == ("lora_" in name) for name, p in adapted.named_parameters())


def test_a_folders_weights_are_those_in_its_file():
    saved = load_file(GLASS / "model.safetensors")
    assert_equal(weights(ADAPTED, 0), saved)


@KINDS
def test_random_bfloat16_weights_are_the_float32_ones_rounded(kind):
    narrow = weights(random_model(kind, "bfloat16"), 3)
    assert {p.dtype for p in narrow.values()} == {torch.bfloat16}
    assert_equal(narrow, {name: p.bfloat16() for name, p in weights(random_model(kind), 3).items()})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_folders_weights_in_another_dtype_are_rounded(dtype):
    narrow = weights(Model(name=str(GLASS), dtype=dtype), 0)
    assert_equal(narrow, {name: p.to(getattr(torch, dtype)) for name, p in weights(ADAPTED, 0).items()})


def test_settings_reach_the_architecture():
    model = load_model(random_model("gpt2", n_layer=3, n_inner=40, attn_pdrop=0.25), None, 0)
    assert len(model.transformer.h) == 3
    assert model.transformer.h[2].mlp.c_fc.weight.shape == (32, 40)
    assert model.transformer.h[0].attn.attn_dropout.p == 0.25


@pytest.mark.parametrize("model", [ADAPTED, Model(name="no/such", tokenizer=str(GLASS)), random_model()])
def test_the_tokenizer(model):
    text = "Through the looking-glass"
    assert load_tokenizer(model)(text).input_ids == Tokenizer.from_file(str(GLASS / "tokenizer.json")).encode(text).ids


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            random_model(hiden_size=3),
            r"^model\.config\.hiden_size: llama has no such setting \(did you mean 'hidden_size'\?\)$",
        ),
        (
            random_model("gpt2", n_layers=3),
            r"^model\.config\.n_layers: gpt2 has no such setting \(did you mean 'n_layer'\?\)$",
        ),
        (
            Model(config={"model_type": "lama"}, tokenizer="x"),
            r"^model\.config\.model_type: transformers has no 'lama'",
        ),
        (random_model(hidden_size="wide"), r"^model\.config: .*hidden_size"),
        (
            Model(name="smollm2-135"),
            r"^model\.name: 'smollm2-135' cannot be loaded: .* \(did you mean 'smollm2-135m'\?\)$",
        ),
    ],
)
def test_a_model_that_is_not_there_gets_a_suggestion(config, message):
    with pytest.raises(UserError, match=message):
        load_model(config, None, 0)


def test_adapters_that_fit_nothing_are_refused():
    with pytest.raises(UserError, match=r"^peft.target_modules: .*q_prj"):
        load_model(ADAPTED, Lora(target_modules=("q_prj",)), 0)


def test_a_tokenizer_that_is_not_there_is_named_with_its_key(tmp_path):
    with pytest.raises(UserError, match=r"^model\.tokenizer: '.*nothing' cannot be loaded"):
        load_tokenizer(Model(name=str(GLASS), tokenizer=str(tmp_path / "nothing")))


def test_what_a_models_code_makes_keeps_its_dtype(tmp_path):
    """Tables of angles in bfloat16 would be another model than the one that is saved and loaded again."""
    first = load_model(random_model(dtype="bfloat16"), None, 0)
    first.save_pretrained(tmp_path)
    again = load_model(Model(name=str(tmp_path), tokenizer=str(GLASS), dtype="bfloat16"), None, 0)
    ids = torch.arange(24).view(2, 12)
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
    assert first.model.rotary_emb.inv_freq.dtype == again.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(first(ids).logits, again(ids).logits)
