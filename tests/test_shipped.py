"""Everything that is shipped works: recipes, examples, the command line, and the wheel."""

import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml

from hybrid_opt import build, load_run, load_schedule
from hybrid_opt.config import load_study, recipes
from hybrid_opt.config.schedule import acting_names
from hybrid_opt.display.progress import Silence
from hybrid_opt.objectives.checking import check_data
from hybrid_opt.planning.checking import policy_tables, timeline
from hybrid_opt.studies.arms import StudyPlan
from tests.conftest import PROSE, ROOT, run_document

RECIPES = sorted((ROOT / "schedules").glob("*.yaml"))


def test_there_are_enough_recipes_and_each_says_what_it_is_for():
    assert len(RECIPES) >= 8
    assert recipes() == {path.stem: path for path in RECIPES}
    for path in RECIPES:
        assert path.read_text().startswith("# "), path
        assert load_schedule(path).description, path


LONG_AND_SHORT = {**run_document(Path())["data"], "max_tokens": 120}
NEEDS = {
    "addax": {"data": LONG_AND_SHORT},
    "lora_backprop_base_es": {"peft": {"r": 2, "trains_base": True}},
}
"""What recipes ask of the run file."""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_plans_and_takes_two_steps(recipe, write_run):
    run = load_run(write_run(schedule=recipe.stem, **NEEDS.get(recipe.stem, {})))
    planned = " ".join(line.plain for line in timeline(run, 120))
    assert all(name in planned for name in acting_names(run.schedule.schedule))
    assert list(policy_tables(run))
    summary = build(run, display=Silence()).train()
    assert summary.steps == 2
    assert 0 < summary.after["loss"] < 30


def python(*arguments: str, cwd: Path = ROOT, timeout: int = 240) -> str:
    result = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_quadratic_example_finds_the_minimum():
    output = python("examples/quadratic.py")
    assert float(output.split()[-1]) < 1e-3


def test_finetune_example(tmp_path):
    output = python("examples/finetune.py", "--model", "tests/data/glass_en", "--text", str(PROSE), "--steps", "6",
                    "--max-tokens", "64", "--output", str(tmp_path / "out"))  # fmt: skip
    assert "loss" in output
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"]


def test_hf_trainer_example_goes_on_from_its_checkpoint(tmp_path):
    common = [
        "--model",
        "tests/data/glass_en",
        "--text",
        str(PROSE),
        "--max-tokens",
        "32",
        "--output",
        str(tmp_path / "out"),
    ]
    whole = python("examples/hf_trainer.py", *common, "--steps", "16").splitlines()[-1]
    before, after = (float(word) for word in whole.split() if word.replace(".", "").isdigit())
    assert after < before
    shutil.rmtree(tmp_path / "out/checkpoint-16")
    again = python("examples/hf_trainer.py", *common, "--steps", "16", "--resume").splitlines()[-1]
    assert again == whole


def test_reward_example_shortens_words(tmp_path):
    output = python("examples/reward.py", "--model", "tests/data/glass_en", "--text", str(PROSE), "--steps", "16",
                    "--output", str(tmp_path / "out"))  # fmt: skip
    assert "held-out reward" in output
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["after"]["reward"] > summary["before"]["reward"] + 0.1


def test_ea4llm_example_lowers_the_held_out_loss(tmp_path):
    """From pretrained and from random weights; a few steps here, its defaults in the README."""
    for start in ("pretrained", "random"):
        output = python("examples/ea4llm.py", "--start", start, "--steps", "4", "--samples", "8", "--rows", "16")
        before, after = (float(word) for word in output.splitlines()[-1].split() if word.replace(".", "").isdigit())
        assert after < before, output


def test_hard_router_example_compares_four_arms():
    """A tenth of a second of steps after two steps of preparation; the README has the real thing."""
    output = python("examples/hard_router.py", "--seconds", "0.1", "--seeds", "3", "--rates", "1e-3", "--prepare", "2")
    rows = {line.split()[0]: line.split() for line in output.splitlines()[-4:]}
    assert list(rows) == ["frozen", "straight_through", "chosen_scaled", "hybrid"]
    assert all(2 < float(row[2]) < 6 for row in rows.values())
    assert float(rows["hybrid"][3]) == 0


def test_the_sums_are_a_run_and_a_study():
    folder = ROOT / "examples/sums"
    run = load_run(folder / "run.yaml")
    check_data(run)
    assert run.objective.type == "reward"
    assert run.objective_of("backprop").type == "causal_lm"
    plan = StudyPlan(load_study(folder / "study.yaml"), folder / "study.yaml")
    assert [arm.name for arm in plan.arms] == ["hybrid", "supervised", "supervised, rate 1e-5", "es"]


def test_the_shipped_study_asks_what_the_readme_says():
    path = ROOT / "examples/studies/es_vs_gradient.yaml"
    plan = StudyPlan(load_study(path), path)
    assert [arm.name for arm in plan.arms[:5]] == ["es 0", "es 0.5", "es 0.8", "es 0.9", "es 1"]
    assert plan.tasks == ["spam", "movies"]
    assert len(plan.cells) == 8 * 2 * 2
    for cell in plan.cells:
        if cell.budget.peak_memory and cell.arm.name.startswith("es"):
            assert len(list(plan.rungs(cell))) == 1 + len(plan.study.fit)


def test_the_study_of_estimators_compares_nine_on_two_tasks():
    path = ROOT / "examples/studies/estimators.yaml"
    plan = StudyPlan(load_study(path), path)
    names = [
        "mezo",
        "fzoo",
        "ea4llm",
        "low rank es",
        "align",
        "lazy subspace",
        "guided",
        "backprop_checkpointing",
        "lora",
    ]
    assert [arm.name for arm in plan.arms] == names
    assert plan.tasks == ["topics", "movies"]
    assert len(plan.cells) * (len(plan.study.seeds) + plan.study.learning_rates.tries) == 108


def test_demo_run_file_is_valid_and_plans():
    run = load_run(ROOT / "examples/spam/run.yaml")
    assert len(list(timeline(run, run.training.steps))) > 1
    tables = list(policy_tables(run))
    assert len(tables) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["check", "examples/spam/run.yaml"],
        ["plan", "examples/spam/run.yaml", "--quick"],
        ["ablate", "examples/studies/es_vs_gradient.yaml", "--dry-run"],
    ],
)
def test_torch_is_not_imported_to_answer(arguments):
    code = f"""
import sys
from hybrid_opt.cli import app
try:
    app({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "transformers", "deepspeed", "datasets", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    python("-c", code)


def test_help_answers_fast():
    """Three tries, because other tests may be running; the bound is twice what the README promises."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        python("-m", "hybrid_opt", "--help")
        times.append(time.perf_counter() - begun)
    assert min(times) < 2


def test_schema_command_prints_json_schema():
    for kind in ("run", "schedule", "study"):
        schema = json.loads(python("-m", "hybrid_opt", "schema", kind))
        assert schema["type"] == "object"
        assert schema["additionalProperties"] is False


def test_wheel_carries_the_recipes_and_finds_them_by_name(tmp_path):
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), ".")
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert not (site / "schedules").exists()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import hybrid_opt, hybrid_opt.config as c; "
        "assert hybrid_opt.__file__.startswith(sys.argv[1]); "
        "print(*c.recipes()); print(c.load_schedule('ea4llm').estimators['es'].population_size)"
    )
    names, population = python("-c", code, str(site), cwd=tmp_path).splitlines()
    assert names.split() == [path.stem for path in RECIPES]
    assert population == "30"


def test_ci_and_readme_agree():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    assert "make demo" in readme.split("## ")[0] + readme.split("## ")[1]
    assert "make test" in readme.split("## ")[0] + readme.split("## ")[1]
    assert "make test" in ci


def test_vendored_data_is_attributed():
    for folder in ("examples/spam", "examples/movies", "tests/data"):
        text = (ROOT / folder / "README.md").read_text()
        assert "licence" in text.lower()
    assert yaml.safe_load((ROOT / "examples/spam/run.yaml").read_text())["model"]["name"] == "smollm2-135m"


def test_deepspeed_is_imported_by_its_engine_alone():
    importing = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hybrid_opt").rglob("*.py")
        if re.search(r"^\s*(from|import) deepspeed\b", path.read_text(), re.MULTILINE)
    ]
    assert sorted(importing) == ["hybrid_opt/engines/zero.py", "hybrid_opt/engines/zero_checkpoint.py"]


def test_check_says_what_zero_saves():
    shown = python(
        "-m", "hybrid_opt", "check", "examples/spam/run.yaml", "engine.type=zero", "engine.zero_stage=2",
        "--schedule", "head_backprop_body_es",
    )  # fmt: skip
    # Two layers of 3,540,096 values of 134,515,008: a float32 master and AdamW's two moments, 12 bytes each.
    assert "backprop may own 7,080,192 of 134,515,008 values" in shown
    assert (
        "AdamW's state and float32 masters take 85.0 MB over all ranks, where for all values they would take 1.61 GB"
        in shown
    )
