"""The documentation against the code: links lead somewhere, code blocks run, commands and YAML are understood, and nothing is left out."""

import ast
import copy
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import torch
import typer.main
import yaml
from transformers import AutoTokenizer

import hybrid_opt
from hybrid_opt.cli import app
from hybrid_opt.cli.resuming import complete_resume
from hybrid_opt.config.evaluation import RowSet
from hybrid_opt.config.explaining import validate
from hybrid_opt.config.loading import load_schedule, recipes
from hybrid_opt.config.run import RunFile
from hybrid_opt.config.study import StudyFile
from hybrid_opt.config.wrappers import Wrapper
from tests.conftest import GLASS, ROOT, run_document, tiny_model, token_batch, token_losses
from tests.integrations.zero_trainer import collate, rows

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    return [body for tag, body in FENCE.findall(page.read_text()) if tag == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@named
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path) if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@named
def test_blocks_say_what_they_are(page):
    assert "" not in [tag for tag, _ in FENCE.findall(page.read_text())] or page.name in ("CONTRIBUTING.md",)


def test_every_page_is_in_the_index():
    for index, folder in ((ROOT / "docs/README.md", ""), (ROOT / "README.md", "docs/")):
        text = index.read_text()
        assert all(f"({folder}{page.name})" in text for page in ROOT.glob("docs/*.md") if page.name != "README.md")


def surroundings() -> dict:
    """What the pages call by these names: a small model, batches and data sets of its own."""
    tokenizer = AutoTokenizer.from_pretrained(GLASS)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    from datasets import Dataset

    return {
        "torch": torch, "model": tiny_model(vocab_size=1024), "batches": [token_batch()] * 4, "token_losses": token_losses, "train_dataset": rows(),
        "eval_dataset": rows(8), "data_collator": collate, "tokenizer": tokenizer, "texts": Dataset.from_list([{"text": f"{i} and {i}"} for i in range(32)]),
    }  # fmt: skip


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = surroundings()
    for block in blocks(page, "python"):
        names["model"] = tiny_model(vocab_size=1024)
        exec(compile(block, page.name, "exec"), names)


@named
def test_commands_are_understood(page):
    commands = typer.main.get_command(app).commands
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "hybrid_opt" in words:  # by a launcher
            words = words[words.index("hybrid_opt") :]
        if not words or words[0] not in ("hybrid-opt", "hybrid_opt"):
            continue
        complete_resume(words)
        commands[words[1]].make_context(words[1], words[2:])


RUN, SCHEDULE = set(RunFile.model_fields), {"estimators", "policy", "schedule", "description"}


def completed(fragment: dict) -> dict:
    """A whole run file around what a page shows of it."""
    document = run_document(Path("out"))
    schedule = copy.deepcopy(load_schedule("alternate").model_dump(mode="json", exclude_unset=True))
    if "schedule" in fragment and not isinstance(fragment["schedule"], dict):
        schedule = load_schedule(fragment["schedule"]).model_dump(mode="json", exclude_unset=True)
        fragment = {key: value for key, value in fragment.items() if key != "schedule"}
    if "estimators" in fragment:
        schedule.pop("policy", None)
    elif "policy" in fragment or "schedule" in fragment:
        schedule["estimators"].setdefault(
            "guided", {"type": "guided", "learning_rate": 1e-3, "perturbation": {"type": "dense"}}
        )
    schedule |= {key: value for key, value in fragment.items() if key in SCHEDULE}
    document |= {key: value for key, value in fragment.items() if key in RUN - SCHEDULE} | {"schedule": schedule}
    if schedule["schedule"].get("length_threshold") == "auto":
        document["training"] = {**document["training"], "memory_budget": "20GB"}
    if "objective" in fragment and "data" not in fragment:
        document.pop("data")
    document["training"] = {"steps": 4, "batch_size": 64, **document["training"]}
    return document


@named
def test_yaml_is_valid(page):
    for block in blocks(page, "yaml"):
        fragment = yaml.safe_load(block)
        if "base" in fragment:
            validate(StudyFile, fragment, lambda loc: ("study", loc))
        elif fragment.keys() == {"data", "objective"}:
            validate(RowSet, fragment, lambda loc: ("rows", loc))
        else:
            assert fragment.keys() <= RUN | SCHEDULE, fragment.keys()
            validate(RunFile, completed(fragment), lambda loc: ("page", loc))


def kinds(union) -> set[str]:
    """The `type`s of a discriminated union."""
    members = get_args(get_args(union)[0]) or (get_args(union)[0],)
    return {get_args(member.model_fields["type"].annotation)[0] for member in members}


def test_nothing_is_left_out():
    from hybrid_opt.config.estimators import Estimator
    from hybrid_opt.config.perturbations import Perturbation
    from hybrid_opt.config.schedule import Schedule

    estimators, schedules = (ROOT / f"docs/{name}.md" for name in ("estimators", "schedules"))
    assert all(f"## `{name}`" in estimators.read_text() for name in kinds(Estimator))
    assert all(f"| `{name}` |" in estimators.read_text() for name in kinds(Perturbation) | kinds(Wrapper))
    assert all(f"`{name}`" in schedules.read_text() for name in kinds(Schedule))
    assert all(f"`{name}`" in schedules.read_text() for name in recipes())
    public = (ROOT / "docs/python.md").read_text().split("## Public names")[1]
    assert set(re.findall(r"`(\w+)`", public.split("Public too")[0])) - {"ValueError"} - {"import hybrid_opt"} == set(
        hybrid_opt.__all__
    )
    told = "\n".join(page.read_text() for page in PAGES)
    assert all(f"hybrid-opt {name}" in told for name in typer.main.get_command(app).commands)


def said_in_code() -> str:
    """All of the package's texts, adjacent ones joined, with an ellipsis for what is filled in."""
    found = []
    for path in ROOT.glob("hybrid_opt/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_errors_of_the_faq_are_said():
    """In order: `acts…, but` may be split where something is filled in."""
    table = (ROOT / "docs/faq.md").read_text().split("## Doubts")[0]
    code = said_in_code()
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    assert len(messages) > 15
    for message in messages:
        pattern = "…+".join(re.escape(part) for part in message.split("…"))
        assert re.search(pattern.replace("\\ …", " ?…"), code), message


def test_every_module_names_the_next():
    for path in sorted(ROOT.glob("hybrid_opt/**/*.py")):
        if path.name == "__main__.py":
            continue
        docstring = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
        told = re.search(r"(Next:|Reading (order|route):)(.*)", docstring)
        assert told, path
        for place in re.findall(r"`([\w./]+\.py|[\w./]+/)`", told.group(3)):
            assert (path.parent / place).exists(), (path, place)
