"""Run files and schedule files: what is accepted, what is refused and in which words."""

import json
import math

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from hybrid_opt.config import RunFile, ScheduleFile, load_run, load_schedule, recipes
from hybrid_opt.errors import UserError
from hybrid_opt.run_files.run_folder import RunFolder
from tests.conftest import GLASS, SPAM, run_document

ES = {"type": "es", "learning_rate": 1e-3}
BP = {"type": "backprop", "learning_rate": 1e-4}
SINGLE = {"type": "single", "estimator": "es"}
CONFIG = {"model_type": "llama", "hidden_size": 8}
TEXT = {"train": str(SPAM), "text": "body"}
INLINE = {
    "estimators": {"es": {**ES, "update": {"type": "adam", "beta1": 0.5}}, "bp": BP},
    "policy": [{"match": "norm", "use": "frozen"}, {"layers": 7, "use": ["es", "bp"]}, {"match": ".*", "use": ["es"]}],
    "schedule": {
        "type": "phases",
        "phases": [
            {"tokens": 100, "schedule": {"type": "alternate", "pattern": {"es": 2, "bp": 1}}},
            {"steps": 3, "schedule": SINGLE, "policy": [{"match": ".*", "use": ["es"]}]},
            {"schedule": {"type": "blend", "weights": {"es": 1, "bp": {"start": 0, "end": 2, "over": 5}}}},
        ],
    },
}


def schedule_document(es=None, bp=None, **changes) -> dict:
    return {"estimators": {"es": {**ES, **(es or {})}, "bp": {**BP, **(bp or {})}}, "schedule": SINGLE, **changes}


def phases(*items: dict) -> dict:
    return {"type": "phases", "phases": [{"schedule": SINGLE, **item} for item in items]}


# ---------------------------------------------------------------- the JSON schema


def kinds(schema: dict, node: dict) -> set[str]:
    """Types that a node of a JSON schema accepts, references followed."""
    if "$ref" in node:
        return kinds(schema, schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
    if "type" in node:
        return {node["type"]}
    return {kind for branch in node.get("anyOf", node.get("oneOf", ())) for kind in kinds(schema, branch)}


def test_json_schema_takes_a_schedule_by_name_or_as_an_object():
    schema = json.loads(json.dumps(RunFile.model_json_schema()))
    assert kinds(schema, schema["properties"]["schedule"]) == {"string", "object"}
    assert "schedule" in schema["required"]
    assert kinds(schema, schema["properties"]["data"]) == {"object"}


def test_json_schema_takes_layers_as_text_number_or_measurement():
    schema = ScheduleFile.model_json_schema()
    assert kinds(schema, schema["$defs"]["Rule"]["properties"]["layers"]) == {"string", "integer", "object", "null"}
    assert load_schedule(INLINE).policy[1].layers == "7"


@pytest.mark.parametrize("file", [RunFile, ScheduleFile])
def test_json_schema_refuses_unknown_keys_and_explains_every_key(file):
    schema = file.model_json_schema()
    for node in (schema, *schema["$defs"].values()):
        assert node["additionalProperties"] is False
        for name, field in node["properties"].items():
            assert name == "type" or field.get("description"), f"{node['title']}.{name}"


def test_json_schema_takes_a_file_or_a_task():
    schema = RunFile.model_json_schema()
    data = schema["$defs"]["Data"]["properties"]
    assert kinds(schema, data["train"]) == {"string", "object"}
    assert kinds(schema, data["validation"]) == {"string", "number", "object", "null"}


# ---------------------------------------------------------------- reading YAML


def test_a_learning_rate_written_3e_5(tmp_path, write_run):
    (tmp_path / "s.yaml").write_text(
        "estimators: {es: {type: es, learning_rate: 3e-5}}\nschedule: {type: single, estimator: es}\n"
    )
    run = load_run(write_run(schedule=str(tmp_path / "s.yaml")), ["schedule.estimators.es.sigma=2e-2"])
    assert run.schedule.estimators["es"].learning_rate == 3e-5
    assert run.schedule.estimators["es"].sigma == 0.02


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        load_run(tmp_path / "none.yaml")
    with pytest.raises(
        UserError, match=r"'alternat' is neither a file nor .* \(did you mean 'alternate'\?\); shipped: "
    ):
        load_schedule("alternat")


# ---------------------------------------------------------------- overrides


OVERRIDES = [
    ("training.steps=7", lambda r: r.training.steps, 7),
    ("output=elsewhere/one", lambda r: r.output, "elsewhere/one"),
    ("data.choices=[a, b]", lambda r: r.data.choices, ("a", "b")),
    ("data.choices.1=' egg'", lambda r: r.data.choices, (" spam", " egg")),
    ("data.validation=1e-1", lambda r: r.data.validation, 0.1),
    ("data.validation=null", lambda r: r.data.validation, None),
    ("data.completion=a=b", lambda r: r.data.completion, "a=b"),
    ("peft.r=4", lambda r: (r.peft.type, r.peft.r, r.peft.lora_alpha), ("lora", 4, 16)),
    ("engine={type: local, device: cuda}", lambda r: r.engine.device, "cuda"),
    ("schedule.estimators.es.learning_rate=3e-5", lambda r: r.schedule.estimators["es"].learning_rate, 3e-5),
    ("schedule.estimators.es.update.beta1=0.25", lambda r: r.schedule.estimators["es"].update.beta1, 0.25),
    ("schedule.policy.0.match=bias", lambda r: [p.match for p in r.schedule.policy], ["bias", None, ".*"]),
    ("schedule.policy.2.use.0=bp", lambda r: r.schedule.policy[2].use, ("bp",)),
    ("schedule.schedule.phases.1.steps=9", lambda r: r.schedule.schedule.phases[1].steps, 9),
    ("schedule.policy=null", lambda r: r.schedule.policy, None),
]


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "file"])
@pytest.mark.parametrize(("override", "get", "expected"), OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_an_override_changes_its_field_alone(tmp_path, write_run, override, get, expected, inline):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(INLINE))
    path = write_run(schedule=INLINE if inline else str(tmp_path / "s.yaml"), peft=None)
    plain, changed = load_run(path), load_run(path, [override])
    assert get(changed) == expected
    assert changed != plain
    top = override.split("=")[0].split(".")[0]
    assert changed.model_dump(exclude={top}) == plain.model_dump(exclude={top})


def test_overrides_follow_one_another_and_reach_a_schedule_chosen_beside_them(write_run):
    path = write_run(schedule="alternate")
    for chosen in ({"schedule": "backprop_only"}, {"overrides": ["schedule=backprop_only"]}):
        overrides = [*chosen.pop("overrides", ()), "schedule.estimators.backprop.learning_rate=1", "training.steps=3"]
        run = load_run(path, [*overrides, "training.steps=4"], **chosen)
        assert run.schedule.model_copy(update={"estimators": None}) == load_schedule("backprop_only").model_copy(
            update={"estimators": None}
        )
        assert run.schedule.estimators["backprop"].learning_rate == 1
        assert run.training.steps == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "'training.steps' is not of the form section.field=value"),
        ("training..steps=3", "is not of the form"),
        ("training.steps=[", "command line: 'training.steps=\\['"),
        ("training.stepz=3", r"^command line: training.stepz: unknown key \(did you mean 'steps'\?\)$"),
        ("training.steps=0", "^command line: training.steps: input should be greater than or equal to 1, got 0$"),
        ("output.name=x", "command line: output.name: output has no field 'name'"),
        ("data.choices.2=x", "command line: data.choices.2: data.choices has no field '2'"),
        (
            "schedule.estimators.es.sigma=.nan",
            r"^command line: schedule.estimators.es.sigma: .* finite number, got nan$",
        ),
    ],
)
def test_overrides_that_fit_nothing(write_run, override, message):
    with pytest.raises(UserError, match=message):
        load_run(write_run(), [override])


def test_errors_name_the_file_that_is_wrong(tmp_path, write_run):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(schedule_document(es={"sigm": 1})))
    path = write_run(schedule=str(tmp_path / "s.yaml"), training={"steps": 1, "batch_sizes": 2})
    with pytest.raises(UserError) as error:
        load_run(path)
    assert set(str(error.value).splitlines()) == {
        f"{path}: training.batch_sizes: unknown key (did you mean 'batch_size'?)",
        f"{tmp_path / 's.yaml'}: estimators.es.sigm: unknown key of es (did you mean 'sigma'?)",
    }


# ---------------------------------------------------------------- file names


def test_names_are_looked_up_here_and_then_beside_the_run_file(tmp_path, monkeypatch):
    folder, here = tmp_path / "project", tmp_path / "here"
    (folder / "model").mkdir(parents=True)
    here.mkdir()
    for name in ("train.jsonl", "held.jsonl", "both.jsonl"):
        (folder / name).write_text("{}\n")
    (here / "both.jsonl").write_text("{}\n")
    (folder / "own.yaml").write_text(yaml.safe_dump(schedule_document(description="own")))
    document = run_document(tmp_path / "out", model={"name": "model", "tokenizer": "model"}, schedule="own.yaml")
    document["data"] |= {"train": "train.jsonl", "validation": "held.jsonl"}
    (folder / "run.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.chdir(here)
    run = load_run("../project/run.yaml")
    beside = "../project/"
    assert (run.model.name, run.model.tokenizer) == (f"{beside}model", f"{beside}model")
    assert (run.data.train, run.data.validation) == (f"{beside}train.jsonl", f"{beside}held.jsonl")
    assert run.schedule.description == "own"
    changed = load_run(
        "../project/run.yaml", ["data.train=both.jsonl", "data.validation=test", "model.name=owner/model"]
    )
    assert (changed.data.train, changed.data.validation) == ("both.jsonl", "test")
    assert changed.model.name == "owner/model"


# ---------------------------------------------------------------- the resolved configuration


def reloaded(run: RunFile, folder) -> RunFile:
    folder.mkdir()
    RunFolder(folder).write_config(run.model_dump(mode="json", exclude_none=True))
    return load_run(folder / "run.yaml")


RICH = {
    "model": {"config": {**CONFIG, "pad_token_id": None, "rms_norm_eps": 1e-06}, "tokenizer": str(GLASS)},
    "peft": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "objective": {"type": "choice"},
    "schedule": {**INLINE, "description": "Zwei Zeilen: ä\n# und 'noch' eine\n"},
}


TASKS = {
    "objective": {"type": "causal_lm"},
    "data": {
        "train": {"task": "countdown", "rows": 3, "seed": 1, "operators": "+-"},
        "validation": {
            "task": "reasoning_gym",
            "name": "leg_counting",
            "rows": 2,
            "split": "all",
            "options": {"a": [1, None]},
        },
        "prompt": "{prompt}",
        "completion": "{answer}",
    },
}


@pytest.mark.parametrize(
    "changes", [*({"schedule": name} for name in recipes()), RICH, TASKS], ids=[*recipes(), "rich", "tasks"]
)
def test_the_resolved_configuration_loads_to_the_same_run(tmp_path, write_run, changes):
    run = load_run(write_run(**changes))
    assert reloaded(run, tmp_path / "folder") == run


def test_texts_that_look_like_numbers_stay_texts(tmp_path):
    """A short commit hash may look like a float in YAML 1.2, though not in YAML 1.1."""
    rules = [{"match": "1e5", "use": "frozen"}, {"match": ".*", "use": ["es"]}]
    model = {"name": str(GLASS), "revision": "12e4567"}
    document = run_document(tmp_path / "out", model=model, schedule=schedule_document(policy=rules))
    (tmp_path / "run.yaml").write_text(json.dumps(document))
    run = load_run(tmp_path / "run.yaml")
    assert (run.model.revision, run.schedule.policy[0].match) == ("12e4567", "1e5")
    assert reloaded(run, tmp_path / "folder") == run


def strict_parts(value):
    if isinstance(value, BaseModel):
        yield value
        for name in type(value).model_fields:
            yield from strict_parts(getattr(value, name))
    elif isinstance(value, (dict, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strict_parts(item)


def test_nothing_can_be_assigned_to(write_run):
    run = load_run(write_run(**RICH))
    before = run.model_dump()
    parts = list(strict_parts(run))
    assert len({type(part) for part in parts}) >= 18
    for part in parts:
        for name in type(part).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(part, name, getattr(part, name))
    assert run.model_dump() == before


# ---------------------------------------------------------------- what is refused: schedule files


def rule(**fields) -> dict:
    return {"policy": [{"use": ["es"], **fields}]}


REFUSED_SCHEDULES = {
    "constant has no warm-up": (
        {"bp": {"warmup_steps": 2}},
        "estimators.bp: learning_rate_schedule 'constant' has no warm-up; write 'constant_with_warmup' or drop "
        "warmup_steps",
    ),
    "odd antithetic population": (
        {"es": {"population_size": 7}},
        "estimators.es: population_size 7 is odd, but antithetic members come in pairs; write 8, or antithetic: false",
    ),
    "population too small to standardize": (
        {"es": {"population_size": 4}},
        "estimators.es: population_size 4 is too small to standardize (with 4 or fewer members the weights hardly "
        "depend on the losses); write 6 or more, or fitness_shaping: none",
    ),
    "learning rate among the optimizer's arguments": (
        {"bp": {"optimizer_arguments": {"lr": 1}}},
        "estimators.bp.optimizer_arguments: 'lr' belongs in learning_rate, not in optimizer_arguments",
    ),
    "bad regular expression": (
        rule(match="("),
        "policy.0.match: '(' is not a regular expression: missing ), unterminated subpattern at position 0",
    ),
    **{
        f"layers {layers}": (
            rule(layers=layers),
            f"policy.0.layers: {layers!r} names no layers; write a number, a range such as 20-29, first-2 or last-4",
        )
        for layers in ("first", "last-0", "1-", "-3", "2,3", "middle-2", " 7")
    },
    "no selector": (rule(), "policy.0: a rule needs either match (a regular expression) or layers (such as 20-29)"),
    "two selectors": (
        rule(match="a", layers=3),
        "policy.0: a rule needs either match (a regular expression) or layers (such as 20-29)",
    ),
    "nobody named": (
        rule(match="a", use=[]),
        "policy.0: use is empty; name the estimators that may move these parameters, or write: use: frozen",
    ),
    "weights 0 at the start": (
        {"schedule": {"type": "blend", "weights": {"es": 0, "bp": {"start": 0, "end": 1, "over": 3}}}},
        "schedule.weights: all weights are 0 at the start or at the end, so no estimator would act",
    ),
    "weights 0 at the end": (
        {"schedule": {"type": "blend", "weights": {"es": 0, "bp": {"start": 1, "end": 0, "over": 3}}}},
        "schedule.weights: all weights are 0 at the start or at the end, so no estimator would act",
    ),
    "two lengths": (
        {"schedule": phases({"steps": 2}, {"steps": 2, "tokens": 2})},
        "schedule.phases: phase 1 has a length both in steps and in tokens; keep one",
    ),
    "no length": (
        {"schedule": phases({}, {"steps": 2})},
        "schedule.phases: phase 0 has no length; give it steps, tokens or until (only the last may have none)",
    ),
    "unknown estimator in the schedule": (
        {"schedule": {"type": "alternate", "pattern": {"es": 1, "bq": 1}}},
        "the schedule names the estimator 'bq', which is not defined; defined: es, bp (did you mean 'bp'?)",
    ),
    "unknown estimator in a phase": (
        {"schedule": phases({"schedule": {"type": "blend", "weights": {"ess": 1}}})},
        "the schedule names the estimator 'ess', which is not defined; defined: es, bp (did you mean 'es'?)",
    ),
    "unknown estimator in the policy": (
        rule(match="a", use=["es", "ess"]),
        "the policy names the estimator 'ess', which is not defined; defined: es, bp (did you mean 'es'?)",
    ),
    "unknown estimator in a phase's policy": (
        {"schedule": phases({"steps": 1}, {"policy": [{"match": "a", "use": ["b"]}]})},
        "the policy of phase 1 names the estimator 'b', which is not defined; defined: es, bp (did you mean 'bp'?)",
    ),
    "two optimizers": (
        {"estimators": {"es": ES, "one": BP, "two": BP}},
        "one and two are both backprop, but there is one optimizer; keep one of them",
    ),
    "nobody to act": (
        {"schedule": {"type": "alternate", "pattern": {}}},
        "schedule.pattern: dictionary should have at least 1 item after validation, not 0, got {}",
    ),
    "unknown type": (
        {"schedule": {"type": "sngle"}},
        "schedule: type is 'sngle'; write one of 'single', 'alternate', 'blend', 'phases', 'adaptive', 'by_length' (did you mean 'single'?)",
    ),
    "key of another form": (
        {"es": {"perturbation": {"type": "dense", "noise_rank": 2}}},
        "estimators.es.perturbation.noise_rank: unknown key of dense; it has type, distribution, backup",
    ),
    "infinite": ({"es": {"sigma": math.inf}}, "estimators.es.sigma: input should be a finite number, got inf"),
    "zero learning rate": (
        {"es": {"learning_rate": 0}},
        "estimators.es.learning_rate: input should be greater than 0, got 0",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_SCHEDULES.values(), ids=REFUSED_SCHEDULES)
def test_schedules_that_are_refused(changes, message):
    load_schedule(schedule_document())
    with pytest.raises(UserError) as error:
        load_schedule(schedule_document(**changes))
    assert str(error.value) == f"schedule: {message}"


@pytest.mark.parametrize(
    "changes",
    [
        {"es": {"population_size": 7, "antithetic": False}},
        {"es": {"population_size": 2, "fitness_shaping": "none"}},
        {"es": {"learning_rate_schedule": "constant_with_warmup", "warmup_steps": 2}},
        {"schedule": {"type": "blend", "weights": {"es": 0, "bp": 1}}},
        {"schedule": phases({"tokens": 2}, {"steps": 2})},
        *(rule(layers=layers) for layers in (0, "7", "20-29", "first-1", "last-12")),
    ],
)
def test_schedules_just_inside_the_limits_are_accepted(changes):
    load_schedule(schedule_document(**changes))


# ---------------------------------------------------------------- what is refused: run files

PROMPT = {"train": str(SPAM), "prompt": "{body}", "completion": "{label}"}
FUNCTION = {"type": "function", "function": "module:losses", "differentiable": False}
REWARD = {"type": "reward", "rewards": [{"function": "exact_match", "arguments": {"column": "label"}}]}
OWN = {"objective": {"type": "causal_lm"}}
ONE_FORMAT = (
    "data: say how a row becomes tokens with exactly one of prompt (with completion), messages or text; given: "
)

REFUSED_RUNS = {
    "no origin": (
        {"model": {}},
        "model: a model needs either name (alias, hub id or folder) or config (random weights)",
    ),
    "two origins": (
        {"model": {"name": "a", "config": CONFIG, "tokenizer": "b"}},
        "model: a model needs either name (alias, hub id or folder) or config (random weights)",
    ),
    "no architecture": (
        {"model": {"config": {"hidden_size": 8}, "tokenizer": "b"}},
        "model: config needs model_type, the architecture's name in transformers, such as 'llama'",
    ),
    "no tokenizer": (
        {"model": {"config": CONFIG}},
        "model: a model from config needs tokenizer, a hub id or a folder",
    ),
    "no format": ({"data": {"train": "x"}}, f"{ONE_FORMAT}none"),
    "two formats": ({"data": {**PROMPT, "text": "body"}}, f"{ONE_FORMAT}prompt, text"),
    "prompt alone": (
        {"data": {"train": "x", "prompt": "{body}"}},
        "objective choice needs data.prompt, data.completion and data.choices",
    ),
    "completion beside text": (
        {"data": {**TEXT, "completion": "{label}"}},
        "data: completion needs prompt, which is missing",
    ),
    "one choice": (
        {"data": {**PROMPT, "choices": [" a"]}},
        "data: choices needs at least two different completions, each written once",
    ),
    "a choice twice": (
        {"data": {**PROMPT, "choices": [" a", " b", " a"]}},
        "data: choices needs at least two different completions, each written once",
    ),
    "choice without choices": (
        {"data": PROMPT},
        "objective choice needs data.prompt, data.completion and data.choices",
    ),
    "choice of texts": (
        {"data": {**TEXT, "choices": [" a", " b"]}},
        "objective choice needs data.prompt, data.completion and data.choices",
    ),
    "no gradient": (
        {"objective": FUNCTION},
        "objective.differentiable is false, but the estimator 'backprop' is backprop, which needs a gradient; use a "
        "schedule of es estimators alone",
    ),
    "no function": (
        {"objective": {"type": "function", "function": "losses"}},
        "objective.function: 'losses' is not of the form module:function, such as losses:my_losses",
    ),
    "a reward has no gradient": (
        {"objective": REWARD, "data": PROMPT},
        "a reward has no gradient, but the estimator 'backprop' is backprop; give it an objective of its own, such as objectives: "
        "{backprop: {objective: {type: causal_lm}}}, or use a schedule of es estimators alone",
    ),
    "a reward of texts": (
        {"objective": REWARD, "data": TEXT, "schedule": "es_only"},
        "objective reward needs prompts to answer: write data.prompt or messages, not text",
    ),
    "an objective of nobody": (
        {"objective": REWARD, "data": PROMPT, "objectives": {"backdrop": OWN}},
        "objectives names the estimator 'backdrop', which the schedule does not define (did you mean 'backprop'?); defined: es, "
        "backprop",
    ),
    "an own objective without completions": (
        {"objective": REWARD, "data": {"train": str(SPAM), "prompt": "{body}"}, "objectives": {"backprop": OWN}},
        "objective causal_lm needs data.completion, which goes with data.prompt",
    ),
    "own data without completions": (
        {
            "objective": REWARD,
            "data": PROMPT,
            "objectives": {"backprop": {**OWN, "data": {"train": str(SPAM), "prompt": "{body}"}}},
        },
        "objective causal_lm needs objectives.backprop.data.completion, which goes with data.prompt",
    ),
    "own data to validate on": (
        {
            "objective": REWARD,
            "data": PROMPT,
            "objectives": {"backprop": {**OWN, "data": {**PROMPT, "validation": "x"}}},
        },
        "objectives.backprop.data.validation: only the run's own objective is evaluated; drop it",
    ),
    "an objective for who evaluates nothing": (
        {
            "objective": {"type": "causal_lm"},
            "data": TEXT,
            "objectives": {"stale": OWN},
            "schedule": {
                "estimators": {"backprop": BP, "stale": {"type": "stale_gradient", "learning_rate": 1e-4}},
                "schedule": {"type": "alternate", "pattern": {"backprop": 1, "stale": 1}},
            },
        },
        "objectives.stale: a stale_gradient evaluates nothing, so it has no objective; drop it",
    ),
    "greedy top_k": (
        {"objective": {**REWARD, "generation": {"top_k": 5}}, "data": PROMPT, "schedule": "es_only"},
        "objective.generation: top_k and top_p are for sampling, but temperature is 0; write a temperature, or drop them",
    ),
    "an empty stop": (
        {"objective": {**REWARD, "generation": {"stop": [""]}}, "data": PROMPT, "schedule": "es_only"},
        "objective.generation: stop holds an empty text, which would end every completion at once; drop it",
    ),
    "chat without a prompt": ({"data": {**TEXT, "chat": True}}, "data: chat needs prompt, which is missing"),
    "fraction of 1": ({"data": {**TEXT, "validation": 1.5}, "objective": {"type": "causal_lm"}}, None),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_RUNS.values(), ids=REFUSED_RUNS)
def test_runs_that_are_refused(write_run, changes, message):
    path = write_run(**changes)
    with pytest.raises(UserError) as error:
        load_run(path)
    if message is None:
        assert "data.validation: input should be less than 1, got 1.5" in str(error.value)
    else:
        assert str(error.value) == f"{path}: {message}"


def test_a_function_without_gradient_suits_a_schedule_of_es_alone(write_run):
    run = load_run(write_run(objective=FUNCTION, schedule="es_only"))
    assert run.objective.differentiable is False
