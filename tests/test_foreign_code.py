"""Nothing that a run file, a model's folder or a dataset brings along is executed unless the user says so."""

import json
import pickle
import shutil
import sys

import pytest
import yaml

from hybrid_opt import UserError, build, cli, load_run
from hybrid_opt.display.progress import Silence
from hybrid_opt.models.loading import load_model, load_tokenizer
from tests.conftest import GLASS, run_document
from tests.test_bad_inputs import contents, exit_code

CAUSAL = {"data.choices": None, "objective": {"type": "causal_lm"}}
OWN = {"type": "function", "function": "evil:losses"}
JUDGED = {
    "type": "reward",
    "rewards": [{"function": "exact_match", "arguments": {"column": "label"}}, {"function": "evil:losses"}],
}
ES_ONLY = {"estimators": {"es": {"type": "es", "population_size": 6, "sigma": 1e-3, "learning_rate": 1e-5}},
           "schedule": {"type": "single", "estimator": "es"}}  # fmt: skip
NAMED = {
    "objective.function": {**CAUSAL, "objective": OWN},
    "objective.rewards.1.function": {**CAUSAL, "objective": JUDGED},
    "objectives.es.objective.function": {**CAUSAL, "objectives": {"es": {"objective": OWN}}},
    "objectives.es.objective.rewards.1.function": {**CAUSAL, "objectives": {"es": {"objective": JUDGED}}},
}
TRUST = {"model.trust_remote_code": True}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with a module that leaves a mark when it is imported; caches are kept out of the user's."""
    monkeypatch.setenv("HYBRID_OPT_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path.parent / "modules"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(f"{MARK}\ndef losses(*args, **kwargs): ...\n")
    yield tmp_path
    sys.modules.pop("evil", None)


MARK = "import pathlib; pathlib.Path('ran').write_text('')"


def write_run(folder, changes):
    document = run_document(folder / "out", schedule=ES_ONLY)
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        (document[section] if section else document)[last] = value
    (folder / "run.yaml").write_text(yaml.safe_dump(document))
    return "run.yaml"


def write_study(folder, changes):
    write_run(folder, {})
    study = {"base": "run.yaml", "budgets": [{"steps": 1}], "output": "study", "arms": {"theirs": changes}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return "study.yaml"


@pytest.mark.parametrize("key", NAMED)
def test_training_needs_leave_for_functions(place, monkeypatch, capsys, key):
    before = contents(place) | {"run.yaml": None}
    assert exit_code(monkeypatch, "train", write_run(place, NAMED[key])) == 2
    assert capsys.readouterr().err == (
        f"error: run.yaml: {key}: evil:losses is code, which would run with all your rights; look at it, and if you trust it say "
        "--allow-code (in Python: allow_code=True)\n"
    )
    assert contents(place).keys() == before.keys()  # no mark, no folder


@pytest.mark.parametrize("key", NAMED)
def test_a_study_needs_leave_for_functions(place, monkeypatch, capsys, key):
    path = write_study(place, NAMED[key])
    assert exit_code(monkeypatch, "ablate", path) == 2
    assert f"error: study.yaml: task 'run', arm 'theirs': {key}: evil:losses is code" in capsys.readouterr().err
    assert not (place / "ran").exists()
    assert not (place / "study").exists()


def test_with_leave_it_is_imported(place, monkeypatch, capsys):
    path = write_run(place, NAMED["objective.function"])
    assert exit_code(monkeypatch, "train", path, "--allow-code", "model.name=no_such_model") == 2
    assert "no_such_model" in capsys.readouterr().err
    with pytest.raises(UserError, match="must return one loss an example"):
        build(load_run(path), allow_code=True, display=Silence()).train()
    assert (place / "ran").exists()


def test_from_python_too(place):
    with pytest.raises(UserError, match=r"^objective\.function: evil:losses is code"):
        build(load_run(write_run(place, NAMED["objective.function"])))
    assert not (place / "ran").exists()


def test_verify_needs_leave(place, monkeypatch, capsys):
    assert exit_code(monkeypatch, "verify", write_run(place, NAMED["objective.function"])) == 2
    assert "run.yaml: objective.function: evil:losses is code" in capsys.readouterr().err
    assert not (place / "ran").exists()


@pytest.mark.parametrize("key", NAMED)
@pytest.mark.parametrize("command", ["check", "plan"])
def test_looking_imports_nothing(place, monkeypatch, capsys, command, key):
    assert exit_code(monkeypatch, command, write_run(place, NAMED[key])) == 0
    said = f"{key}: evil:losses is code; to train with it say --allow-code"
    assert (said in capsys.readouterr().out) == (command == "check")
    assert not (place / "ran").exists()


ARGUMENTS = {
    "worker_cls": "evil.Worker",
    "download_dir": "/tmp",
    "logits_processors": ["evil:x"],
    "trust_remote_code": True,
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_vllms_arguments_may_be_code(place, argument):
    generation = {
        "engine": "vllm",
        "engine_arguments": {"max_loras": 4, "dtype": "bfloat16", argument: ARGUMENTS[argument]},
    }
    reward = {"type": "reward", "rewards": [{"function": "exact_match"}], "generation": generation}
    run = load_run(write_run(place, {**CAUSAL, "objective": reward}))
    with pytest.raises(UserError, match=rf"^objective\.generation\.engine_arguments\.{argument}: what vLLM makes of"):
        build(run)


# ---------------------------------------------------------------- what a model's folder brings along


def copied_model(place, **config):
    shutil.copytree(GLASS, place / "theirs")
    path = place / "theirs/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return {"model.name": "theirs"}


def with_code(place):
    """A model with Python files, which leave a mark, and after that are the model that they copied."""
    named = copied_model(
        place, model_type="theirs", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    )
    (place / "theirs/code.py").write_text(
        f"{MARK}\nfrom transformers import LlamaConfig, LlamaForCausalLM\nclass C(LlamaConfig): model_type = 'theirs'\n"
        "class M(LlamaForCausalLM): config_class = C\n"
    )
    return named


@pytest.mark.parametrize("command", ["train", "check", "plan", "verify", "ablate"])
def test_a_models_own_code_needs_leave(place, monkeypatch, capsys, command):
    changes = with_code(place) | TRUST
    path = write_study(place, changes) if command == "ablate" else write_run(place, changes)
    assert exit_code(monkeypatch, command, path) == 2
    assert "model.trust_remote_code: what comes with theirs is code" in capsys.readouterr().err
    assert not (place / "ran").exists()


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_models_own_code_does_not_run_unless_it_is_trusted(place, monkeypatch, capsys, command):
    assert exit_code(monkeypatch, command, write_run(place, with_code(place)), "--allow-code") == 2
    assert "model.name: 'theirs' cannot be loaded: " in capsys.readouterr().err
    assert not (place / "ran").exists()


def test_a_models_own_code_runs_with_leave(place, monkeypatch):
    assert exit_code(monkeypatch, "check", write_run(place, with_code(place) | TRUST), "--allow-code") == 0
    assert (place / "ran").exists()


def test_a_tokenizers_own_code_does_not_run(place):
    run = load_run(write_run(place, copied_model(place)))
    config = place / "theirs/tokenizer_config.json"
    mapped = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["code.T", None]}}
    config.write_text(json.dumps(json.loads(config.read_text()) | mapped))
    (place / "theirs/code.py").write_text(f"{MARK}\nclass T: ...\n")
    with pytest.raises(UserError, match=r"model\.name: 'theirs' cannot be loaded"):
        load_tokenizer(run.model)
    assert not (place / "ran").exists()


def test_a_tokenizers_templates_are_not_saved_elsewhere(place):
    run = load_run(write_run(place, copied_model(place)))
    config = place / "theirs/tokenizer_config.json"
    templates = [{"name": "default", "template": "a"}, {"name": "../../../x", "template": "b"}]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": templates}))
    with pytest.raises(UserError, match=r"^model\.name: the tokenizer has a chat template '\.\./\.\./\.\./x'"):
        load_tokenizer(run.model)


class Evil:
    """Its pickle runs code where it is loaded."""

    def __reduce__(self):
        return exec, (MARK,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_weights_run_nothing(place):
    run = load_run(write_run(place, copied_model(place)))
    (place / "theirs/model.safetensors").unlink()
    (place / "theirs/pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Evil()}))
    with pytest.raises(UserError, match=r"model\.name: 'theirs' cannot be loaded"):
        load_model(run.model, None, 0)
    assert not (place / "ran").exists()


def test_kernels_by_name_are_refused(place):
    run = load_run(write_run(place, copied_model(place, attn_implementation="somebody/attention")))
    with pytest.raises(UserError, match=r"^model\.name: 'theirs' asks for 'somebody/attention'"):
        load_model(run.model, None, 0)


def test_a_chat_template_is_a_program_in_a_box(place):
    (place / "rows.jsonl").write_text(
        json.dumps({"chat": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
    )
    data = {"train": "rows.jsonl", "messages": "chat", "max_tokens": 32}
    changes = {**copied_model(place), "data": data, "objective": {"type": "causal_lm"}}
    (place / "theirs/chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}{{ messages }}"
    )
    with pytest.raises(UserError, match=r"data\.messages: row 0: the chat template refuses it: access to attribute"):
        build(load_run(write_run(place, changes)), display=Silence())
    assert not (place / "ran").exists()


# ---------------------------------------------------------------- what a dataset brings along


@pytest.mark.parametrize("name", ["theirs.py", "train.pkl", "train.pickle", "cache.arrow", "dataset_infos.json"])
def test_a_datasets_folder_runs_nothing(place, name):
    (place / "theirs").mkdir()
    content = f"{MARK}\nimport datasets\nclass D(datasets.GeneratorBasedBuilder): ...\n".encode()
    (place / "theirs" / name).write_bytes(content if name.endswith(".py") else pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"data\.train: "):
        build(load_run(write_run(place, {"data.train": "theirs"})), display=Silence())
    assert not (place / "ran").exists()


def test_a_prompt_template_reads_columns_and_nothing_of_them(place):
    run = load_run(write_run(place, {"data.prompt": "{subject.__class__.__init__.__globals__}"}))
    with pytest.raises(UserError, match=r"data\.prompt: there is no column 'subject\.__class__"):
        build(run, display=Silence())


def test_the_commands_help_says_so(capsys, monkeypatch):
    for command in ("train", "check", "plan", "ablate", "verify"):
        monkeypatch.setattr(sys, "argv", ["hybrid-opt", command, "--help"])
        with pytest.raises(SystemExit):
            cli.main()
        assert "--allow-code" in capsys.readouterr().out
