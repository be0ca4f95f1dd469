"""Two thousand broken run, schedule, study and DeepSpeed files: each ends in a clear error or in a valid run, at once.

The documents and what is done to them follow from fixed seeds (`derandomize`), so every machine sees the same ones.
"""

import contextlib
import copy
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from hybrid_opt import UserError, build, load_run
from hybrid_opt.config import load_study
from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.explaining import validate
from hybrid_opt.config.foreign_code import code_of
from hybrid_opt.config.loading import recipes
from hybrid_opt.config.run import Model, RunFile
from hybrid_opt.config.yaml_text import parse_yaml
from hybrid_opt.display.progress import Silence
from hybrid_opt.engines.deepspeed_config import DeepSpeedSettings
from hybrid_opt.models.inventory import inventory
from hybrid_opt.objectives.checking import check_data
from hybrid_opt.objectives.time_limit import TimedOut, call_within
from hybrid_opt.planning.checking import cost_table, objective_lines, timeline
from hybrid_opt.run_files.run_folder import dump_yaml
from hybrid_opt.scheduling.policy import resolve_policies
from hybrid_opt.studies.arms import StudyPlan
from tests.conftest import GLASS, LLAMA_LIKE

SLOWEST = 10.0
"""Seconds for one document; most take a hundredth of one."""

ES = {"type": "es", "population_size": 6, "sigma": 1e-3, "learning_rate": 1e-5}
ROWS = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(4)]
TASK = {"task": "arithmetic", "rows": 8, "largest": 9}
BASE = {
    "model": {"name": "smollm2-135m", "dtype": "float32", "tokenizer": None},
    "data": {"train": "rows.jsonl", "validation": 0.25, "prompt": "Q: {question}\nA:", "completion": " {answer}", "max_tokens": 16},
    "objective": {"type": "causal_lm"},
    "training": {"steps": 4, "batch_size": 4, "seed": 0, "probe_rows": 1, "budget": None},
    "engine": {"type": "local", "device": "cpu"},
    "schedule": "schedule.yaml",
    "output": "out",
}  # fmt: skip
ADAPTED = {**BASE, "peft": {"trains_base": True}}
REWARD = {
    **BASE,
    "data": {"train": TASK, "validation": TASK, "prompt": "{question}", "completion": "{answer}", "max_tokens": 64},
    "objective": {
        "type": "reward",
        "rewards": [{"function": "exact_match", "arguments": {"column": "answer"}}, {"function": "losses:brevity", "weight": 0.1}],
        "generation": {"max_new_tokens": 8, "stop": ["\n"], "temperature": 0.7, "top_k": 4, "engine_arguments": {}},
    },
    "objectives": {"backprop": {"objective": {"type": "causal_lm"}, "batch_size": 4, "data": {"train": "rows.jsonl", "text": "answer"}}},
    "report_to": ["tensorboard"],
}  # fmt: skip
ZERO = {
    **BASE,
    "objective": {"type": "function", "function": "losses:mine", "differentiable": True},
    "peft": {"type": "lora", "r": 2, "target_modules": ["q_proj"]},
    "engine": {"type": "zero", "zero_stage": 2, "deepspeed_config": "ds.json", "micro_batch_size": 2, "offload_optimizer": {"device": "cpu"}},
    "training": {"budget": {"seconds": 9.5}, "batch_size": 8},
}  # fmt: skip
DEEPSPEED = {
    "train_batch_size": "auto",
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}, "reduce_bucket_size": "auto"},
    "steps_per_print": 10,
}  # fmt: skip
STUDY = {
    "base": "run.yaml",
    "tasks": {"one": {}, "two": {"data.max_tokens": 12}},
    "axes": {"schedule.schedule": {"half": {"type": "single", "estimator": "es"}}, "size": {"small": {"training.batch_size": 1}}},
    "arms": {"as written": {}},
    "baselines": ["lora"],
    "reference": "as written",
    "budgets": [{"seconds": 60, "peak_memory": "1.6GB"}, {"steps": 2}],
    "fit": [{"model.dtype": "bfloat16"}],
    "learning_rates": {"type": "grid", "factors": [0.3, 1]},
    "seeds": [0, 1],
    "output": "study",
}  # fmt: skip
SCHEDULES = [yaml.safe_load(path.read_text()) for path in recipes().values()]
PHASES = {
    "description": "both",
    "estimators": {
        "es": {**ES, "perturbation": {"type": "low_rank", "noise_rank": 1}, "wrappers": [{"type": "norm_cap", "norm": 1.0}]},
        "backprop": {"type": "backprop", "learning_rate": 1e-5, "optimizer": "AdamW", "optimizer_arguments": {"betas": [0.9, 0.99]}},
    },
    "policy": [{"layers": "first-2", "use": ["es"]}, {"match": ".*", "use": ["es", "backprop"]}],
    "schedule": {"type": "phases", "phases": [
        {"steps": 2, "schedule": {"type": "single", "estimator": "es"}},
        {"schedule": {"type": "blend", "weights": {"es": {"start": 0, "end": 1, "over": 3}, "backprop": 1}}},
    ]},
}  # fmt: skip

TURNS = {
    "estimators": {"es": ES, "backprop": {"type": "backprop", "learning_rate": 1e-5}},
    "schedule": {"type": "alternate", "pattern": {"es": 1, "backprop": 1}},
}

# ---------------------------------------------------------------- what is done to documents

KEYS = st.sampled_from(
    ["type", "steps", "name", "train", "estimators", "es", "schedule", "data", "seed", "a.b", "../x", "", "é", "\t", "0", "x" * 300]
)  # fmt: skip
EXTREMES = [
    *(None, True, False, 0, -1, 1, 2, 10**6, 2**31, 2**63 - 1, 2**63, 10**400, -(10**30)),
    *(0.0, -0.5, 1e-320, 1e308, 0.999999, math.inf, -math.inf, math.nan),
    *("", " ", "auto", "none", "0", "1e400", "9" * 5000, "x" * 5000, "é" * 300, "\0", "a\tb\nc", "\u202e", "🙂"),
    *("../../x", "/etc/passwd", "a/b", "~", ".", "rows.jsonl", "evil:code", "{question", "{0}", "(", "a{99999}", "last-9", "9-1"),
    *([], {}, [[]], [None], {"": {}}, {"type": "es"}, {"type": None}, [{"type": "single", "estimator": "es"}], {"a": [1, {"b": 2}]}),
]  # fmt: skip
SCALARS = st.one_of(st.integers(), st.floats(), st.text(max_size=12), st.booleans())
VALUES = st.one_of(
    st.sampled_from(EXTREMES), SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(KEYS, SCALARS, max_size=2)
)


def places(tree, way=()):
    """The keys on the way to every value below the whole."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*way, key)
        yield from places(value, (*way, key))


def at(tree, way):
    for key in way:
        tree = tree[key]
    return tree


def near(draw, value):
    """Another value of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return draw(st.integers(0, 9) | st.sampled_from([10**6, 2**63 - 1]))
        case float():
            return draw(st.sampled_from([0.5, 1.0, 1e-3, 1e-300, 1e300]))
        case str() if value:
            return draw(
                st.sampled_from([value + "x", value[1:], value.upper(), "es", "backprop", "text", "*", "{answer}"])
            )
    return copy.deepcopy(draw(VALUES))


def mutate(draw, tree):
    """One change of a document, in place: a value, a key, or two parts that change places."""
    ways = list(places(tree))
    if not ways:
        return
    way = draw(st.sampled_from(ways))
    parent, key = at(tree, way[:-1]), way[-1]
    match draw(st.sampled_from(["near"] * 6 + ["value"] * 4 + ["drop", "double", "rename", "swap", "into"])):
        case "value":
            parent[key] = copy.deepcopy(draw(VALUES))
        case "near":
            parent[key] = near(draw, parent[key])
        case "drop":
            del parent[key]
        case "double" if isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        case "double":
            parent[draw(KEYS)] = copy.deepcopy(parent[key])
        case "rename" if isinstance(parent, dict):
            parent[draw(KEYS)] = parent.pop(key)
        case "swap":
            other = draw(st.sampled_from(ways))
            if way != other[: len(way)] and other != way[: len(other)]:
                place = at(tree, other[:-1])
                parent[key], place[other[-1]] = place[other[-1]], parent[key]
        case "into":
            parent[key] = [parent[key]] if draw(st.booleans()) else {draw(KEYS): parent[key]}


@st.composite
def trees(draw, *documents):
    """One of the documents with up to three changes."""
    tree = json.loads(json.dumps(draw(st.sampled_from(documents))))  # in which no two parts are one object
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        mutate(draw, tree)
    return tree


MARKS = [
    b"\0",
    b"\xff",
    b"\t",
    b"\n",
    b"[",
    b"{",
    b"- ",
    b": ",
    b"*a ",
    b"&a ",
    b"!!set ",
    b"<<: ",
    b"? ",
    b"'",
    b"|\n",
    b"%",
]


@st.composite
def texts(draw, *documents):
    """One of the texts, cut off, with bits turned over, or with bytes put in."""
    content = bytearray(draw(st.sampled_from(documents)))
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["cut", "flip", "flip", "insert", "insert"])):
            case "cut":
                del content[place:]
            case "flip" if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                content[place:place] = draw(st.sampled_from(MARKS) | st.binary(max_size=4))
    return bytes(content)


# ---------------------------------------------------------------- what is done with them

MODEL = Model(name="smollm2-135m")
ADAPTER = "model.layers.0.mlp.up_proj.lora_A.default.weight"
NAMES = list(inventory(MODEL, None).shapes)


def read_run(path: str) -> None:
    """Everything that `check` and `plan` do without a model, and what `train` does before it loads one."""
    run = load_run(path)
    resolved = run.model_dump(mode="json", exclude_none=True)
    again = RunFile.model_validate(parse_yaml(dump_yaml(resolved), "run.yaml"))
    assert again.model_dump(mode="json", exclude_none=True) == resolved  # the copy in the run folder is the run
    list(code_of(run))
    list(timeline(run, min(run.training.steps or 40, 40)))
    list(objective_lines(run))
    resolve_policies(run.schedule, [*NAMES, ADAPTER] if run.peft else NAMES)
    if (run.model.name, run.peft) == (MODEL.name, None):  # of which all is known without torch
        cost_table(run)
    check_data(run)
    if run.engine.type == "zero":
        read_deepspeed(run)


def read_deepspeed(run: RunFile) -> None:
    """What becomes of the `engine` section and its DeepSpeed file."""
    found = DeepSpeedSettings(run.engine)
    dtype = found.dtype(run.model.dtype, given=False)
    found.offloads()
    for estimator in run.schedule.estimators.values():
        if isinstance(estimator, Backprop):
            json.dumps(found.deepspeed(found.backprop(estimator), dtype, 2, 64))
    found.check_batch_size(run.training.batch_size, 2)


def read_study(path: str) -> None:
    """What `ablate` does before the first run."""
    plan = StudyPlan(load_study(path), Path(path))
    for cell in plan.cells:
        assert not cell.place.is_absolute()
        assert all(part != ".." and len(os.fsencode(part)) < 200 for part in cell.place.parts), cell.place
        list(plan.rungs(cell))


READERS = {
    "run.yaml": (read_run, "run.yaml"),
    "schedule.yaml": (read_run, "run.yaml"),
    "ds.json": (read_run, "run.yaml"),
    "study.yaml": (read_study, "study.yaml"),
}


def is_valid(name: str, document: object) -> bool:
    """Whether a document makes a run that could start; an error that does not explain itself, and a hang, fail the test."""
    files = {
        "run.yaml": ZERO if name == "ds.json" else ADAPTED if b"lora_" in written(document, name) else BASE,
        "schedule.yaml": TURNS,
        "ds.json": DEEPSPEED,
        name: document,
    }
    for file, content in files.items():
        Path(file).write_bytes(written(content, file))
    read, path = READERS[name]
    try:
        call_within(SLOWEST, lambda: read(path))
        problem = None
    except UserError as error:
        problem = str(error)
    except TimedOut:
        raise AssertionError(f"no end within {SLOWEST:g} s") from None
    assert problem is None or all(line.strip() for line in problem.split("\n")), problem
    return problem is None


def written(document: object, name: str) -> bytes:
    """Bytes as they are, a document as JSON; in YAML, which JSON is too, infinity is written in its own way."""
    if isinstance(document, bytes):
        return document
    text = json.dumps(document, indent=1, ensure_ascii=False)
    if name.endswith(".yaml"):
        text = text.replace("Infinity", ".inf").replace("NaN", ".nan")
    return text.encode()


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The current folder, with the data that the documents name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        patch.setenv("HYBRID_OPT_CACHE", "cache")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", "cache")
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        yield


ALL = [("run.yaml", BASE), ("run.yaml", REWARD), ("run.yaml", ZERO), ("ds.json", DEEPSPEED), ("study.yaml", STUDY)]
ALL += [("schedule.yaml", document) for document in (PHASES, *SCHEDULES)]


@pytest.mark.parametrize("number", range(len(ALL)))
def test_the_documents_are_valid_as_they_are(number):
    assert is_valid(*ALL[number])


def examples(count: int, documents: st.SearchStrategy, is_valid: Callable[[Any], bool]) -> list[Any]:
    """Those of so many documents that are valid; the first that something is wrong with is shown, made as simple as possible."""
    seen: list[tuple[Any, bool]] = []

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(document=documents)
    def look(document):
        note(document.decode(errors="replace") if isinstance(document, bytes) else json.dumps(document, indent=1))
        seen.append((document, is_valid(document)))

    look()
    assert len(seen) >= 0.9 * count  # fewer only where they repeat themselves
    valid = [document for document, was in seen if was]
    assert 0.05 * count <= len(valid) <= 0.95 * count, len(valid)
    return valid


def test_every_place_in_turn():
    documents = [("run.yaml", BASE), ("run.yaml", REWARD), ("run.yaml", ZERO), ("schedule.yaml", PHASES)]
    cases = [(*case, way, value) for value in EXTREMES for case in documents for way in places(case[1])]
    cases = cases[::17]  # every place and every extreme, not every pair of them
    assert len(cases) >= 500
    for name, document, way, value in cases:
        changed = json.loads(json.dumps(document))
        at(changed, way[:-1])[way[-1]] = value
        try:
            is_valid(name, changed)
        except Exception as error:
            raise AssertionError(f"{name}: {'.'.join(map(str, way))}: {str(value)[:80]}") from error


def test_run_files():
    examples(350, trees(BASE, REWARD, ZERO), partial(is_valid, "run.yaml"))


def test_schedule_files():
    examples(450, trees(PHASES, *SCHEDULES), partial(is_valid, "schedule.yaml"))


def test_run_files_byte_by_byte():
    documents = [yaml.safe_dump(document, sort_keys=False).encode() for document in (BASE, REWARD, ZERO)]
    examples(350, texts(*documents), partial(is_valid, "run.yaml"))


def test_schedule_files_byte_by_byte():
    documents = [path.read_bytes() for path in recipes().values()]
    examples(350, texts(*documents), partial(is_valid, "schedule.yaml"))


def test_study_files():
    examples(100, trees(STUDY), partial(is_valid, "study.yaml"))


def test_deepspeed_files():
    examples(100, trees(DEEPSPEED), partial(is_valid, "ds.json"))


def test_settings_of_models():
    def is_model(config: dict[str, Any]) -> bool:
        try:  # one layer: how much a model takes is the user's matter
            document = {"config": {**config, "num_hidden_layers": 1}, "tokenizer": "x"}
            inventory(validate(Model, document, lambda keys: ("f", keys)), None)
        except UserError:
            return False
        return True

    document = {key: value for key, value in LLAMA_LIKE.items() if key != "num_hidden_layers"}
    examples(
        60, trees({"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True, **document}), is_model
    )


def test_some_that_are_valid_are_trained():
    finished = 0
    for number, document in enumerate(examples(40, trees(PHASES), partial(is_valid, "schedule.yaml"))):
        Path("schedule.yaml").write_bytes(written(document, "schedule.yaml"))
        run = load_run("run.yaml", [f"model.name={GLASS}", "training.steps=2", f"output=trained-{number}"])
        if finished == 5 or any(e.forwards_a_step > 64 for e in run.schedule.estimators.values()):
            continue
        with contextlib.suppress(UserError):  # such as a policy that does not suit this model
            finished += build(run, display=Silence()).train().steps == 2
    assert finished >= 3
