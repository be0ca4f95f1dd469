"""Bad input to the command line: exit code 2, one message that says where and what, and nothing written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

from hybrid_opt import cli
from hybrid_opt.config import load_run
from hybrid_opt.run_files.messages import NAME as MESSAGES
from hybrid_opt.run_files.presence import NAME as PROCESS
from tests.conftest import GLASS, ROOT, run_document

Arrange = Callable[[Path], list[str]]
"""Writes a case's files into a folder and gives the command's arguments."""

RUN, SCH, CLI = "run.yaml: ", "schedule.yaml: ", "command line: "
ABSENT = object()  # in place of a value: the key is left out
ROWS = [{"subject": f"offer {i}", "body": "cheap and new", "label": "spam" if i % 2 else "ham"} for i in range(8)]
ES = {"type": "es", "population_size": 6, "sigma": 1e-3, "learning_rate": 1e-5}
BACKPROP = {"type": "backprop", "learning_rate": 1e-5}
STALE = {"estimators.stale": {"type": "stale_gradient", "learning_rate": 1e-5}}
TURNS = {"type": "alternate", "pattern": {"es": 1, "backprop": 1}}
ALL, MLP = {"match": ".*", "use": ["es", "backprop"]}, {"match": "mlp", "use": ["es", "backprop"]}
ENDLESS = {"schedule": {"type": "single", "estimator": "backprop"}}
AGAIN = {"schedule": {"type": "single", "estimator": "stale"}}
STALE_PHASES = {"type": "phases", "phases": [{**ENDLESS, "steps": 1}, {**AGAIN, "tokens": 9}, ENDLESS]}
APART = {
    "schedule.pattern": {"stale": 1, "backprop": 1},
    "policy": [{"match": "mlp", "use": ["backprop", "es"]}, {"match": ".*", "use": ["stale", "es"]}],
}
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 1024, "n_positions": 8}
CAUSAL = {"objective": {"type": "causal_lm"}, "data.choices": ABSENT}
BARE = {**CAUSAL, "data.completion": "{label}", "data.append_eos": False}
TEXT = {**CAUSAL, "data.prompt": ABSENT, "data.completion": ABSENT, "data.text": "body", "data.max_tokens": 8}
SUMS, GYM = (
    {"task": "arithmetic", "rows": 20, "largest": 9},
    {"task": "reasoning_gym", "name": "leg_counting", "rows": 2},
)
CHAT = {**CAUSAL, "data.prompt": ABSENT, "data.completion": ABSENT, "data.messages": "chat", "data.validation": ABSENT}
ASK, ANSWER = {"role": "user", "content": "offer"}, {"role": "assistant", "content": "spam"}
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LOSSES = "NUMBER = 1\ndef losses(model, batch): ...\n"


def changed(document: dict, changes: dict) -> dict:
    """A copy with the values of dotted keys replaced."""
    document = json.loads(json.dumps(document))
    for key, value in changes.items():
        *way, last = key.split(".")
        place = document
        for part in way:
            place = place.setdefault(part, {})
        place[last] = value
        if value is ABSENT:
            del place[last]
    return document


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def run(changes: dict | None = None, *arguments: str, files: dict[str, str | bytes] | None = None) -> Arrange:
    """A run file with changed values, eight rows of data beside it, and further files."""

    def arrange(folder: Path) -> list[str]:
        base = changed(run_document(folder / "out"), {"data.train": "rows.jsonl", "data.validation": 0.25})
        document = yaml.safe_dump(changed(base, changes or {}), sort_keys=False)
        for name, content in {"run.yaml": document, "rows.jsonl": jsonl(*ROWS), **(files or {})}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["run.yaml", *arguments]

    return arrange


def raw(content: bytes) -> Arrange:
    return run(files={"run.yaml": content})


def data(content: str | bytes | list, changes: dict | None = None, name: str = "rows.jsonl") -> Arrange:
    content = jsonl(*content) if isinstance(content, list) else content
    return run({"data.train": name, **(changes or {})}, files={name: content})


def task(changes: dict, base: dict | None = None, **others) -> Arrange:
    """A built-in task as training data, with changed options."""
    own = {
        "prompt": "{question}",
        "completion": "{answer}",
        "validation": ABSENT,
        "train": changed(base or SUMS, changes),
        **others,
    }
    return run({**CAUSAL, **{f"data.{key}": value for key, value in own.items()}})


def schedule(changes: dict) -> Arrange:
    document = changed({"estimators": {"es": ES, "backprop": BACKPROP}, "schedule": TURNS}, changes)
    return run({"schedule": "schedule.yaml"}, files={"schedule.yaml": yaml.safe_dump(document, sort_keys=False)})


def es(**values) -> Arrange:
    return schedule({f"estimators.es.{key}": value for key, value in values.items()})


def backprop(**values) -> Arrange:
    return schedule({f"estimators.backprop.{key}": value for key, value in values.items()})


def turns(**pattern) -> Arrange:
    return schedule({"schedule.pattern": pattern})


def blend(**weights) -> Arrange:
    return schedule({"schedule": {"type": "blend", "weights": weights}})


def phases(*items: dict) -> Arrange:
    return schedule({"schedule": {"type": "phases", "phases": list(items)}})


def stale(values: dict) -> Arrange:
    return schedule({**STALE, **values})


def endless(**budget) -> Arrange:
    """A run within a budget of forward passes, at whose end nobody makes one."""
    kind = {"type": "phases", "phases": [{**ENDLESS, "steps": 1}, AGAIN]}
    document = changed({"estimators": {"backprop": BACKPROP}, "schedule": kind}, STALE)
    return run({"training.budget": budget, "training.steps": ABSENT, "schedule": document})


def policy(*rules: dict) -> Arrange:
    return schedule({"policy": list(rules)})


def weightless(config: dict, **settings) -> Arrange:
    return run({"model": {"config": {**config, **settings}, "tokenizer": str(GLASS)}})


def glass(files: dict, changes: dict | None = None, *arguments: str, without: str = "", place="glass") -> Arrange:
    """The model from a copy of its folder, in which files are replaced or missing."""

    def arrange(folder: Path) -> list[str]:
        shutil.copytree(GLASS, folder / place, ignore=shutil.ignore_patterns(without))
        return run({"model.name": place, **(changes or {})}, *arguments, files=files)(folder)

    return arrange


def chat(template: str, *messages) -> Arrange:
    return glass({"glass/chat_template.jinja": template, "rows.jsonl": jsonl({"chat": messages})}, CHAT)


def function(path: str, code: str = LOSSES, recipe: str = "alternate", **settings) -> Arrange:
    objective = {"type": "function", "function": path, **settings}
    return run({**CAUSAL, "objective": objective, "schedule": recipe}, "--allow-code", files={"losses.py": code})


def interrupted(changes: dict) -> Arrange:
    """`--resume` on a checkpoint without content, by a run file changed since."""

    def arrange(folder: Path) -> list[str]:
        run()(folder)
        config = load_run(folder / "run.yaml").model_dump(mode="json", exclude_none=True)
        files = {"out/run.yaml": yaml.safe_dump(config), "out/checkpoints/step-00000001/values.json": "[]"}
        return run(changes, "--resume", files=files)(folder)

    return arrange


def case(name: str, where: str, arrange: Arrange, *fragments: str, command: str = "train"):
    """The message must hold `where`, which is the file or the command line, and the fragments: the key, and a hint."""
    return pytest.param(command, arrange, where, fragments, id=name)


check = partial(case, command="check")

CASES = [
    # the files as such
    case("missing run file", "no.yaml: ", lambda folder: ["no.yaml"], "no such file"),
    case("run file is a folder", ".: ", lambda folder: ["."], "cannot be read", "directory"),
    case("empty run file", RUN, raw(b""), "found nothing", "output: runs/one"),
    case("a list", RUN, raw(b"- output: a\n"), "found a list", "output: runs/one"),
    case("syntax error", RUN, raw(b"model:\n  name: [a\noutput: x\n"), "line 3"),
    case("key twice", RUN, raw(b"output: a\noutput: b\n"), "line ", "'output' is written twice"),
    case("control character", RUN, raw(b"output: a\x00b\n"), "#x0000"),
    case("not UTF-8", RUN, raw(b"output: \xe9\n"), "cannot be read", "utf-8"),
    case("broken schedule file", "s.yaml: ", run({"schedule": "s.yaml"}, files={"s.yaml": "a: [\n"}), "line 2"),
    case(
        "missing schedule file",
        RUN,
        run({"schedule": "my.yaml"}),
        "schedule: 'my.yaml'",
        "shipped: adaptive, addax, align, alternate",
    ),
    case("unknown recipe", RUN, run({"schedule": "alternat"}), "schedule: 'alternat'", "'alternate'?"),
    # keys
    case("missing section", RUN, run({"data": ABSENT}), "data: missing"),
    case("missing key", RUN, run({"data.train": ABSENT}), "data.train: missing"),
    case("no end", RUN, run({"training.steps": ABSENT}), "training: say how long", "budget such as {seconds: 600}"),
    case(
        "two budgets", RUN, run({"training.budget": {"seconds": 1, "tokens": 1}}), "training.budget: ", "exactly one of"
    ),
    case(
        "negative budget", RUN, run({"training.budget": {"seconds": -1}}), "training.budget.seconds: ", "greater than 0"
    ),
    case("unknown key", RUN, run({"traning": {"steps": 2}}), "traning: unknown key", "'training'?"),
    case("unknown key within", RUN, run({"training.stepz": 2}), "training.stepz: unknown key", "'steps'?"),
    check("unknown key, check", RUN, run({"training.stepz": 2}), "training.stepz: unknown key", "'steps'?"),
    case("unknown key in the schedule", SCH, es(sgima=1e-3), "estimators.es.sgima: unknown key", "'sigma'?"),
    case("key at the wrong place", RUN, run({"seed": 1}), "seed: unknown key", "training.seed"),
    # kinds of values
    case("empty section", RUN, run({"data": None}), "data: ", "keys and values"),
    case("text for a section", RUN, run({"model": "smollm2-135m"}), "model: ", "keys and values", "'smollm2-135m'"),
    case("text for a typed section", RUN, run({"objective": "choice"}), "objective: ", "type", "'choice'"),
    case("text for a number", RUN, run({"training.steps": "ten"}), "training.steps: ", "integer", "'ten'"),
    case("truth for a number", RUN, run({"training.steps": True}), "training.steps: ", "True"),
    case("number for a text", RUN, run({"data.prompt": 3}), "data.prompt: ", "string", "3"),
    case("text for a list", RUN, run({"data.choices": "spam"}), "data.choices: ", "list", "'spam'"),
    case("nothing for a text", RUN, run({"data.train": ""}), "data.train: ", "at least 1"),
    case("unknown dtype", RUN, run({"model.dtype": "fp16"}), "model.dtype: ", "'float16'", "'fp16'"),
    # estimators
    case("odd population", SCH, es(population_size=7), "estimators.es: ", "population_size 7 is odd", "write 8"),
    case("small population", SCH, es(population_size=4), "estimators.es: ", "population_size 4", "write 6"),
    case("negative sigma", SCH, es(sigma=-1e-3), "estimators.es.sigma: ", "greater than 0", "-0.001"),
    case("zero sigma", SCH, es(sigma=0), "estimators.es.sigma: ", "greater than 0"),
    case("rate nan", SCH, es(learning_rate=float("nan")), "estimators.es.learning_rate: ", "finite", "nan"),
    case("rate inf", SCH, backprop(learning_rate=float("inf")), "estimators.backprop.learning_rate: ", "finite"),
    case("unknown course", SCH, es(learning_rate_schedule="cosin"), "es.learning_rate_schedule: ", "'cosine'"),
    case("constant with warm-up", SCH, es(warmup_steps=2), "estimators.es: ", "'constant_with_warmup'"),
    case(
        "unknown estimator type",
        SCH,
        es(type="sgd"),
        "estimators.es: type is 'sgd'",
        "write one of 'es', 'spsa', ",
        "'backprop'",
    ),
    case("unknown optimizer", SCH, backprop(optimizer="AdmaW"), "estimators.backprop.optimizer: ", "'AdamW'"),
    case("lr argument", SCH, backprop(optimizer_arguments={"lr": 1}), "optimizer_arguments: ", "in learning_rate"),
    case("unknown argument", SCH, backprop(optimizer_arguments={"b": 1}), "backprop.optimizer_arguments: ", "'b'"),
    case("arguments at odds", SCH, backprop(optimizer_arguments={"fused": True, "foreach": True}), "`foreach`"),
    case("two backprops", SCH, schedule({"estimators.bp": BACKPROP}), "backprop and bp", "keep one"),
    case(
        "stale only",
        SCH,
        stale({"schedule.pattern": {"es": 1, "stale": 1}}),
        "'stale': stale_gradient uses gradients",
        "{backprop: 1, stale: 9}",
    ),
    case("stale alone in tokens", SCH, stale({"schedule": STALE_PHASES}), "phase 1 ", "stale", "give it steps"),
    case("stale to spend", RUN, endless(tokens=99), "training.budget counts", "stale", "write training.steps too"),
    case("stale to compute", RUN, endless(forward_equivalents=9), "training.budget counts", "write training.steps too"),
    case("nothing to repeat", SCH, stale(APART), "policy: 'stale' uses gradients", "write use: [backprop, stale]"),
    # schedules
    case("unknown schedule type", SCH, schedule({"schedule": {"type": "mix"}}), "schedule: type is 'mix'", "'blend'"),
    case("unknown estimator", SCH, turns(bprop=1), "schedule names the estimator 'bprop'", "'backprop'?"),
    case("empty pattern", SCH, turns(), "schedule.pattern: ", "at least 1"),
    case("weights all zero", SCH, blend(es=0, backprop=0), "schedule.weights: all weights are 0"),
    case("negative weight", SCH, blend(es=-1, backprop=1), "schedule.weights.es: ", "greater than or equal to 0"),
    case("phase without length", SCH, phases(ENDLESS, ENDLESS), "schedule.phases: phase 0", "steps, tokens or until"),
    case("phase with two lengths", SCH, phases({**ENDLESS, "steps": 1, "tokens": 9}), "phase 0", "keep one"),
    # policies
    case("unknown in a policy", SCH, policy({**ALL, "use": ["ess"]}), "policy names the estimator 'ess'", "'es'?"),
    case("matches nothing", SCH, policy({**ALL, "match": "q_prj"}, ALL), "policy.0: match 'q_prj'", "attn.q_proj"),
    check("matches nothing, check", SCH, policy({**ALL, "match": "q_prj"}, ALL), "policy.0: match", "attn.q_proj"),
    case("shadowed", SCH, policy(ALL, MLP), "policy.1: match 'mlp'", "earlier rules", "move it up or drop it"),
    case("uncovered", SCH, policy(MLP), "policy: ", "by no rule", "model.embed_tokens.weight", "use: frozen"),
    case("layers out of range", SCH, policy({"layers": "4-9", "use": ["es"]}), "policy.0: layers 4-9", "0 to 3"),
    case("layers backwards", SCH, policy({"layers": "3-1", "use": ["es"]}), "policy.0.layers: '3-1'", "write 1-3"),
    case("malformed layers", SCH, policy({"layers": "two", "use": ["es"]}), "policy.0.layers: 'two'", "20-29"),
    case("bad expression", SCH, policy({**ALL, "match": "(mlp"}), "policy.0.match: '(mlp'", "position 0"),
    case("match and layers", SCH, policy({**ALL, "layers": "1"}), "policy.0: ", "either match", "or layers"),
    case("empty use", SCH, policy({**ALL, "use": []}), "policy.0: use is empty", "use: frozen"),
    case("text for use", SCH, policy({**ALL, "use": "es"}), "policy.0.use: ", "'frozen'", "list", "'es'"),
    case("acts on nothing", SCH, policy({**ALL, "use": ["es"]}), "policy: 'backprop' acts", "no rule"),
    # where data comes from
    case("missing data file", RUN, run({"data.train": "no.jsonl"}), "data.train: no.jsonl: no such file"),
    case("unknown ending", RUN, data("a\n", name="rows.text"), "data.train: rows.text: ", "ending", ".jsonl"),
    case("empty data file", RUN, data(""), "data.train: rows.jsonl: ", "empty"),
    case("CSV without rows", RUN, data("subject,body,label\n", name="rows.csv"), "data.train: rows.csv: ", "no rows"),
    case("broken line", RUN, data(jsonl(ROWS[0]) + "{\n"), "data.train: ", "rows.jsonl, line 2: not JSON"),
    check("broken line, check", RUN, data(jsonl(ROWS[0]) + "{\n"), "data.train: ", "rows.jsonl, line 2: not JSON"),
    case("line not an object", RUN, data([ROWS[0], [1]]), "data.train: ", "rows.jsonl, line 2", "expected an object"),
    case("data not UTF-8", RUN, data(jsonl(*ROWS).encode().replace(b"new", b"\xe9")), "rows.jsonl", "utf-8"),
    check("CSV not UTF-8", RUN, data(b"subject,b\xe9\n", name="rows.csv"), "data.train: ", "rows.csv", "utf-8"),
    case("validation missing", RUN, run({"data.validation": "no.csv"}), "data.validation: no.csv: no such file"),
    case("no such split", RUN, run({"data.validation": "test"}), "data.validation: ", "'train'", "'test'"),
    case("validation beyond 1", RUN, run({"data.validation": 1.5}), "data.validation: ", "less than 1", "1.5"),
    case("unknown task", RUN, task({"task": "arithmetc"}), "data.train: task is 'arithmetc'", "'arithmetic'?"),
    case("task without name", RUN, task({"task": ABSENT}), "data.train: task is missing"),
    case("task option unknown", RUN, task({"largst": 9}), "data.train.largst: unknown key", "'largest'?"),
    case("task option of a wrong kind", RUN, task({"terms": "two"}), "data.train.terms: ", "integer", "'two'"),
    case("numbers swapped", RUN, task({"smallest": 10}), "data.train: smallest 10 is above largest 9", "swap"),
    case("operator unknown", RUN, task({"operators": "+^"}), "data.train.operators: '^' is no operator", "+-*"),
    case("operator twice", RUN, task({"operators": "++"}), "data.train.operators: '++'", "once"),
    case("too many rows", RUN, task({"rows": 999}), "data.train.rows: 999 rows", "in the split 'train'; write rows: "),
    case(
        "validation's rows", RUN, task({}, validation={**SUMS, "rows": 99}), "data.validation.rows: 99 rows", "held_out"
    ),
    case("no list for train", RUN, task({}, train=[1]), "data.train: ", "string", "keys and values", "[1]"),
    case("split beside a task", RUN, task({}, split="test"), "data: split and subset", "within the task"),
    case("split of a task by name", RUN, task({}, validation="test"), "data: validation 'test' is no file", "held_out"),
    case("no column in a task", RUN, task({}, prompt="{numbers}"), "data.prompt: ", "'numbers'", "question, answer"),
    check("no column in a task, check", RUN, task({}, prompt="{questin}"), "data.prompt: ", "'questin'", "'question'?"),
    check("unknown gym task, check", RUN, task({"name": "leg_countin"}, GYM), "data.train: ", "'leg_counting'?"),
    check(
        "gym task that evaluates",
        RUN,
        task({"name": "n_queens"}, GYM),
        "data.train: ",
        "'n_queens' is not offered",
        "eval",
    ),
    case("gym option unknown", RUN, task({"options": {"legs": 1}}, GYM), "data.train.options: leg_counting", "legs"),
    case(
        "gym seed among options", RUN, task({"options": {"seed": 1}}, GYM), "data.train.options: 'seed' belongs in seed"
    ),
    case("nothing held out", RUN, run({"data.validation": 0.01}), "data.validation: 0.01 of 8 examples"),
    # what data holds
    case("missing column", RUN, data([{"body": "a", "label": "ham"}]), "data.prompt: ", "'subject'", "body, label"),
    check("missing column, check", RUN, data([{"subjct": "a"}]), "data.prompt: ", "'subject'", "'subjct'?"),
    case("null value", RUN, data([*ROWS, {**ROWS[0], "body": None}]), "data.prompt: row 8", "'body'", "rows.jsonl"),
    case("no choice's label", RUN, data([{**ROWS[0], "label": "spma"}]), "data.completion: row 0", "' spam'?"),
    case("open brace", RUN, run({"data.prompt": "{subject"}), "data.prompt: ", "'{subject'", "write {{"),
    case("empty answer", RUN, data([{**ROWS[0], "label": ""}] * 8, BARE), "data.completion: row 0", "rows.jsonl"),
    case("one choice", RUN, run({"data.choices": [" spam"]}), "data: choices", "two different"),
    case("no choices", RUN, run({"data.choices": ABSENT}), "objective choice needs", "data.choices"),
    case("prompt and text", RUN, run({"data.text": "body"}), "data: ", "exactly one of", "given: prompt, text"),
    case("no completion", RUN, run({"data.completion": ABSENT}), "objective choice needs data.prompt, data.completion"),
    case("few tokens", RUN, run({"data.max_tokens": 5}), "data.max_tokens: 5 tokens are too few", "row 0"),
    case("text of numbers", RUN, data([{"body": 3}] * 8, TEXT), "data.text: row 0", "3"),
    case(
        "no chat template",
        RUN,
        data([{"chat": [ASK, ANSWER]}], CHAT),
        "data: the tokenizer has no chat template",
        "use prompt",
    ),
    case("no answer", RUN, chat(PLAIN, ASK), "data.messages: row 0", "{role, content}", "rows.jsonl"),
    case("messages without roles", RUN, chat(PLAIN, "a", "b"), "data.messages: row 0", "{role, content}"),
    case("template refuses", RUN, chat("{{ raise_exception('x!') }}", ASK, ANSWER), "data.messages: row 0", "x!"),
    # models
    case("unknown model", RUN, run({"model.name": "smollm"}), "model.name: 'smollm'", "'smollm2-135m'?"),
    case("no config in folder", RUN, run({"model.name": "m"}, files={"m/a": ""}), "model.name: 'm'", "config.json"),
    case("no weights", RUN, glass({}, without="*.safetensors"), "model.name: 'glass'", "model.safetensors"),
    case("broken config", RUN, glass({"glass/config.json": "{"}), "model.name: 'glass'", "config.json"),
    case("broken weights", RUN, glass({"glass/model.safetensors": "x"}), "model.name: 'glass'"),
    case("wrong weights", RUN, glass({"glass/config.json": json.dumps(LLAMA)}), "model.name: 'glass'", "config.json"),
    case("name and config", RUN, run({"model.config": LLAMA}), "model: ", "either name", "or config"),
    case("no tokenizer named", RUN, run({"model": {"config": LLAMA}}), "model: ", "from config needs tokenizer"),
    case("unknown model_type", RUN, weightless(LLAMA, model_type="lama"), "model.config.model_type: ", "'llama'?"),
    case("not a language model", RUN, weightless({"model_type": "vit"}), "model.config.model_type: ", "vit"),
    case("unknown setting", RUN, weightless(LLAMA, hiden_size=9), "model.config.hiden_size: ", "'hidden_size'?"),
    case("heads that do not fit", RUN, weightless(LLAMA, num_attention_heads=5), "model.config: ", "heads (5)"),
    case("small vocabulary", RUN, weightless(LLAMA, vocab_size=64), "model.config.vocab_size: ", "64"),
    case("few positions", RUN, weightless(GPT2), "data.max_tokens: ", "8 positions"),
    case("adapters fit nothing", RUN, run({"peft": {"target_modules": ["q_prj"]}}), "peft.target_modules: ", "q_prj"),
    case("adapters' expression", RUN, run({"peft": {"target_modules": "(q"}}), "peft.target_modules: ", "position 0"),
    case("unusable device", RUN, run({"engine.device": "cuda:99"}), "engine.device: 'cuda:99'", "write auto or cpu"),
    # objectives
    case("bad function path", RUN, function("losses"), "objective.function: ", "module:function", "'losses'"),
    case("relative module", RUN, function(".losses:losses"), "objective.function: ", "'.losses"),
    case("missing module", RUN, function("loses:losses"), "objective.function: cannot import 'loses'"),
    case("broken module", RUN, function("losses:losses", "def f(:\n"), "objective.function: ", "losses.py"),
    case("missing function", RUN, function("losses:loss"), "objective.function: module 'losses' has no 'loss'"),
    case("not a function", RUN, function("losses:NUMBER"), "objective.function: ", "NUMBER"),
    case("turns, no gradient", RUN, function("losses:losses", differentiable=False), "differentiable", "es estimators"),
    case("blend, no gradient", RUN, function("losses:losses", LOSSES, "blend_ramp", differentiable=False), "backprop"),
    # the output folder
    case("output below a file", RUN, run({"output": "rows.jsonl/out"}), "output: rows.jsonl/out cannot be written to"),
    case("other things", RUN, run(files={"out/notes": ""}), "output: ", "(notes)", "choose a new folder"),
    case("a run already", RUN, run(files={"out/metrics.jsonl": ""}), "output: ", "--resume", "--overwrite"),
    case("model to lose", RUN, glass({}, {}, "--overwrite", place="out/model"), "model.name: ", "--overwrite"),
    case("nothing to resume", RUN, run({}, "--resume"), "output: ", "no checkpoint", "--overwrite"),
    case("resume something else", RUN, interrupted({"training.seed": 7}), "training.seed was 0 and is now 7"),
    case(
        "broken checkpoint",
        "out/checkpoints/step-00000001/manifest.json cannot be read",
        interrupted({}),
        "cannot be read",
    ),
    # the command line
    case("resume and overwrite", CLI, run({}, "--resume", "--overwrite"), "--resume", "--overwrite", "one of them"),
    case("recipe as an option", CLI, run({}, "--schedule", "esonly"), "schedule: 'esonly'", "'es_only'?"),
    case("no equals sign", CLI, run({}, "training.steps"), "'training.steps'", "section.field=value"),
    case("broken value", CLI, run({}, "training.steps=[1"), "'training.steps=[1'", "line 1"),
    case("into a value", CLI, run({}, "training.steps.one=1"), "training.steps.one: ", "no field 'one'"),
    case("unknown section", CLI, run({}, "traning.steps=1"), "traning: unknown key", "'training'?"),
    case("wrong type", CLI, run({}, "training.steps=ten"), "training.steps: ", "integer", "'ten'"),
    case("odd by override", CLI, run({}, "schedule.estimators.es.population_size=7"), "population_size 7 is odd"),
]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, but for who has tried to use it and why in vain."""
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    found = (path for path in found if path.name not in (MESSAGES, PROCESS))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


def exit_code(monkeypatch, *arguments: str) -> int:
    """What the command line exits with."""
    monkeypatch.setattr(sys, "argv", ["hybrid-opt", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


@pytest.fixture(autouse=True)
def own_place(tmp_path, tmp_path_factory, monkeypatch):
    """The current folder is the run file's, and caches are kept out of the user's."""
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.setenv("HYBRID_OPT_CACHE", cache)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("losses", None)


@pytest.mark.parametrize(("command", "arrange", "where", "fragments"), CASES)
def test_is_explained_and_writes_nothing(command, arrange, where, fragments, tmp_path, monkeypatch, capsys):
    arguments = arrange(tmp_path)
    before = contents(tmp_path)
    code, message = exit_code(monkeypatch, command, *arguments), capsys.readouterr().err
    assert code == 2
    assert contents(tmp_path) == before
    assert message.startswith("error: "), message
    assert message.count("\n") == 1, message
    assert len(message) < 700, message
    assert [fragment for fragment in fragments if fragment not in message] == [], message
    assert where in message, message


def test_libraries_add_no_words_of_their_own(tmp_path):
    command = [sys.executable, "-m", "hybrid_opt", "train", *data(jsonl(ROWS[0]) + "{\n")(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    "arrange",
    [run(), policy(ALL), weightless(LLAMA), task({}, validation=SUMS), task({}, GYM)],
    ids=["recipe", "policy", "weightless", "task", "gym task"],
)
def test_good_input_passes_check(arrange, tmp_path, monkeypatch, capsys):
    assert exit_code(monkeypatch, "check", *arrange(tmp_path)) == 0
    assert "run.yaml: valid" in capsys.readouterr().out
