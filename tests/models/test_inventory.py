"""Names and shapes without weights against those of the model really loaded."""

import json
import shutil
import subprocess
import sys

import pytest

from hybrid_opt.config.run import Lora, Model
from hybrid_opt.models.inventory import inventory
from hybrid_opt.models.loading import load_model
from tests.conftest import GLASS, ROOT, TINY

ADAPTERS = {
    "full": None,
    "lora": Lora(r=3),
    "lora on two": Lora(target_modules=("q_proj", "down_proj"), lora_dropout=0.1),
    "lora by pattern": Lora(target_modules=r".*\.1\..*(q_proj|c_attn)"),
}
MODELS = {
    "llama": Model(config={"model_type": "llama", **TINY["llama"]}, tokenizer=str(GLASS)),
    "tied llama": Model(config={"model_type": "llama", **TINY["llama"], "tie_word_embeddings": True}, tokenizer="x"),
    "gpt2": Model(config={"model_type": "gpt2", **TINY["gpt2"]}, tokenizer=str(GLASS), dtype="bfloat16"),
    "folder": Model(name=str(GLASS)),
}
ANSWER = """
import json, sys
from hybrid_opt.config.run import Lora, Model
from hybrid_opt.models.inventory import inventory
found = inventory(Model(**json.loads(sys.argv[1])), Lora(**json.loads(sys.argv[2])) if sys.argv[2] != "null" else None)
print(json.dumps([list(found.shapes.items()), [name for name in ("torch", "transformers", "peft") if name in sys.modules]]))
"""


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_OPT_CACHE", str(tmp_path / "cache"))


def trained(config: Model, lora: Lora | None) -> list[tuple[str, tuple[int, ...]]]:
    model = load_model(config, lora, seed=0)
    return [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]


def applicable():
    for model in MODELS:
        for adapters in ADAPTERS:
            if not (model == "gpt2" and adapters == "lora on two"):
                yield model, adapters


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("model", "adapters"), applicable())
def test_inventory_equals_the_loaded_model(model, adapters):
    config, lora = MODELS[model], ADAPTERS[adapters]
    expected = trained(config, lora)
    assert len(expected) >= 2
    assert list(inventory(config, lora).shapes.items()) == expected
    assert list(inventory(config, lora).shapes.items()) == expected  # from the cache


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("model", "adapters"), [("llama", "full"), ("folder", "lora")])
def test_the_second_answer_needs_no_torch(model, adapters):
    config, lora = MODELS[model], ADAPTERS[adapters]
    arguments = [json.dumps(part and part.model_dump()) for part in (config, lora)]
    first = inventory(config, lora)
    output = subprocess.run(
        [sys.executable, "-c", ANSWER, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    second, imported = json.loads(output)
    assert [(name, tuple(shape)) for name, shape in second] == list(first.shapes.items())
    assert imported == []


@pytest.mark.usefixtures("own_cache")
def test_models_that_differ_do_not_share_an_answer():
    llama = {"model_type": "llama", **TINY["llama"]}
    shapes = [
        inventory(Model(config={**llama, "vocab_size": size}, tokenizer="x"), None).shapes["model.embed_tokens.weight"]
        for size in (64, 65)
    ]
    assert shapes == [(64, 32), (65, 32)]
    plain, adapted = (len(inventory(MODELS["llama"], lora).shapes) for lora in (None, Lora()))
    assert (plain, adapted) == (21, 28)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert [inventory(MODELS["llama"], Lora(r=r)).shapes[name] for r in (2, 5)] == [(2, 32), (5, 32)]


@pytest.mark.usefixtures("own_cache")
def test_a_folder_whose_configuration_changes_is_looked_at_again(tmp_path):
    shutil.copy(GLASS / "config.json", tmp_path / "config.json")
    before = inventory(Model(name=str(tmp_path)), None).shapes
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 2}))
    after = inventory(Model(name=str(tmp_path)), None).shapes
    assert (len(before), len(after)) == (4 * 9 + 2, 2 * 9 + 2)
    assert after.items() < before.items()


def test_the_packaged_inventory_equals_the_demos_model():
    """In the cache folder of everyday, where the demo's model is converted once and kept."""
    config = Model(name="smollm2-135m")
    assert list(inventory(config, None).shapes.items()) == trained(config, None)


@pytest.mark.usefixtures("own_cache")
def test_parameters_that_low_rank_noise_cannot_reach_are_listed_with_the_reason():
    mamba = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32, "state_size": 4}
    found = inventory(Model(config=mamba, tokenizer="x"), None)
    assert found.not_low_rank["backbone.layers.0.mixer.A_log"] == "it belongs to a MambaMixer module"
    assert found.not_low_rank["backbone.layers.0.mixer.conv1d.weight"] == "it belongs to a Conv1d module"
    assert "backbone.layers.0.mixer.in_proj.weight" not in found.not_low_rank
    assert inventory(Model(config=mamba, tokenizer="x"), None) == found  # from the cache
