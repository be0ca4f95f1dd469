"""From study files to runs: names, changes, baselines, and what is said of mistakes."""

from pathlib import Path

import pytest
import yaml

from hybrid_opt import UserError
from hybrid_opt.config import load_run, load_schedule, load_study
from hybrid_opt.config.study import StudyFile
from hybrid_opt.studies.arms import StudyPlan, arms_of
from hybrid_opt.studies.baselines import BASELINES, baseline
from tests.conftest import SPAM, run_document

ES = {"type": "es", "population_size": 4, "sigma": 0.01, "learning_rate": 1e-4, "fitness_shaping": "none"}
ADAMW = {"type": "backprop", "learning_rate": 1e-3, "optimizer_arguments": {"weight_decay": 0.0}}
BOTH = {"es": ES, "backprop": ADAMW}


def hybrid(schedule):
    return {"estimators": BOTH, "schedule": schedule}


ALTERNATE = hybrid({"type": "alternate", "pattern": {"es": 1, "backprop": 3}})


@pytest.fixture
def plan_of(tmp_path):
    """Makes the plan of a study of a run on the small model; keywords are the study's keys."""

    def make(run=None, **study):
        document = run_document(tmp_path / "out", **{"schedule": ALTERNATE, **(run or {})})
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
        document = {"base": "base.yaml", "budgets": [{"steps": 2}], "output": str(tmp_path / "study"), **study}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return StudyPlan(load_study(path), path)

    return make


def runs_of(plan, **where):
    cells = [c for c in plan.cells if all(getattr(c, key) == value for key, value in where.items())]
    return {cell.arm.name: plan.run(cell, 5, Path("somewhere")) for cell in cells}


def test_axes_are_multiplied_and_named(plan_of, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(hybrid({"type": "single", "estimator": "es"})))
    plan = plan_of(
        axes={
            "schedule": ["mine.yaml", "backprop_only"],
            "training.batch_size": [2, 4],
            "size": {
                "small": {"data.max_tokens": 16},
                "large": {"data.max_tokens": 32, "training.evaluation_batch_size": 4},
            },
        },
        arms={"base": {}},
    )
    assert [arm.name for arm in plan.arms] == [
        f"{schedule}, batch_size {size}, {label}"
        for schedule in ("mine", "backprop_only")
        for size in (2, 4)
        for label in ("small", "large")
    ] + ["base"]
    runs = runs_of(plan)
    one = runs["mine, batch_size 4, large"]
    assert set(one.schedule.estimators) == {"es", "backprop"}
    assert one.schedule.schedule.estimator == "es"
    assert (one.training.batch_size, one.data.max_tokens, one.training.evaluation_batch_size) == (4, 32, 4)
    assert list(runs["backprop_only, batch_size 2, small"].schedule.estimators) == ["backprop"]
    assert runs["base"].training.batch_size == 4


def test_what_the_study_settles_is_in_every_run(plan_of):
    plan = plan_of(
        budgets=[{"steps": 7}, {"seconds": 60, "peak_memory": "1.5GB"}], checkpoint_every=9, keep_models=True
    )
    by_steps, by_seconds = (plan.run(cell, 5, Path("somewhere")) for cell in plan.cells)
    assert (by_steps.training.steps, by_steps.training.budget) == (7, None)
    assert (by_seconds.training.steps, by_seconds.training.budget.seconds) == (None, 60)
    assert [cell.budget.label for cell in plan.cells] == ["7 steps", "60 seconds in 1.5 GB"]
    for run in (by_steps, by_seconds):
        assert (run.training.seed, run.training.checkpoint_every, run.training.save_model) == (5, 9, True)
        assert run.output == "somewhere"


def test_tasks_change_the_base_and_the_studys_changes_come_after_them(plan_of):
    plan = plan_of(
        tasks={"a": {"training.batch_size": 2, "data.max_tokens": 8}, "b": {}}, changes={"data.max_tokens": 16}
    )
    a, b = (runs_of(plan, task=task)["base"] for task in ("a", "b"))
    assert (a.training.batch_size, a.data.max_tokens) == (2, 16)
    assert (b.training.batch_size, b.data.max_tokens) == (4, 16)


def test_a_whole_schedule_undoes_earlier_changes_of_it(plan_of):
    plan = plan_of(
        changes={"schedule.estimators.es.sigma": 0.5}, axes={"schedule": ["backprop_only"]}, arms={"base": {}}
    )
    runs = runs_of(plan)
    assert runs["base"].schedule.estimators["es"].sigma == 0.5
    assert list(runs["backprop_only"].schedule.estimators) == ["backprop"]


def test_factors_multiply_all_learning_rates(plan_of):
    plan = plan_of()
    (cell,) = plan.cells
    run = plan.run(cell.changed(*plan.rates_times(cell, 3.0)), 0, Path("x"))
    rates = {name: estimator.learning_rate for name, estimator in run.schedule.estimators.items()}
    assert rates == pytest.approx({"es": 3e-4, "backprop": 3e-3})


def test_rungs_that_do_not_suit_an_arm_are_left_out(plan_of):
    last = {"schedule.policy": [{"layers": "last-1", "use": ["es", "backprop"]}, {"match": ".*", "use": ["es"]}]}
    plan = plan_of(
        budgets=[{"steps": 2, "peak_memory": "1GB"}], fit=[last, {"training.batch_size": 2}], axes={"schedule": ["backprop_only"]},
        arms={"base": {}},
    )  # fmt: skip
    rungs = {cell.arm.name: [fitted for fitted, _ in plan.rungs(cell)] for cell in plan.cells}
    assert rungs["backprop_only"] == ["", "training.batch_size: 2"]
    assert len(rungs["base"]) == 3
    assert "last-1" in rungs["base"][1]


def test_files_are_read_once_so_a_study_does_not_change_while_it_runs(plan_of, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(hybrid({"type": "single", "estimator": "es"})))
    plan = plan_of(arms={"base": {}, "mine": {"schedule": "mine.yaml"}})
    before = runs_of(plan)
    (tmp_path / "base.yaml").write_text("edited: meanwhile")
    (tmp_path / "mine.yaml").write_text("edited: meanwhile")
    assert runs_of(plan) == before


# ---------------------------------------------------------------- baselines


def made(name, tmp_path, schedule, **changes):
    """The run that a baseline makes of a run under test."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_document(tmp_path / "out", schedule=schedule, **changes), sort_keys=False))
    base = load_run(path)
    changed = {**yaml.safe_load(path.read_text()), **baseline(name, base)}
    path.write_text(yaml.safe_dump(changed, sort_keys=False))
    return load_run(path)


def test_every_baseline_of_the_configuration_is_built():
    study = StudyFile(base="x", budgets=[{"steps": 1}], output="y", baselines=list(BASELINES))
    assert [arm.name for arm in arms_of(study)][1:] == list(BASELINES)


def test_backprop_baselines_take_over_the_runs_own_estimator(tmp_path):
    run = made("backprop_checkpointing", tmp_path, ALTERNATE)
    (estimator,) = run.schedule.estimators.values()
    assert (estimator.learning_rate, estimator.gradient_checkpointing) == (1e-3, True)
    assert run.schedule.schedule.type == "single"
    run = made("lora", tmp_path, ALTERNATE)
    (estimator,) = run.schedule.estimators.values()
    assert (run.peft.type, estimator.learning_rate, estimator.gradient_checkpointing) == (
        "lora",
        pytest.approx(1e-2),
        True,
    )


def test_a_run_without_backprop_gets_the_recipes_estimator(tmp_path):
    run = made("backprop_checkpointing", tmp_path, "es_only")
    assert run.schedule.estimators["backprop"].learning_rate == 3e-5


def mezo_recipe():
    return load_schedule("mezo").estimators["spsa"]


def test_mezo_and_ea4llm_are_those_of_the_papers(tmp_path):
    (spsa,) = made("mezo", tmp_path, ALTERNATE).schedule.estimators.values()
    assert spsa.model_dump(exclude={"learning_rate"}) == mezo_recipe().model_dump(exclude={"learning_rate"})
    (es,) = made("ea4llm", tmp_path, ALTERNATE).schedule.estimators.values()
    assert (es.population_size, es.antithetic, es.fitness_shaping, es.divide_by_sigma) == (
        30,
        False,
        "standardize",
        False,
    )


REWARD = {
    "objective": {"type": "reward", "rewards": [{"function": "exact_match", "arguments": {"column": "label"}}]},
    "data": {"train": str(SPAM), "prompt": "{subject}", "completion": " {label}"},
    "objectives": {"sgd": {"objective": {"type": "causal_lm"}, "batch_size": 2}},
}


@pytest.mark.parametrize(
    ("name", "own"),
    [("backprop_checkpointing", ["sgd"]), ("lora", ["sgd"]), ("stale_gradient", ["sgd"]), ("order_swapped", ["sgd"]),
     ("mezo", []), ("ea4llm", [])],
)  # fmt: skip
def test_baselines_of_a_run_with_a_reward_keep_the_objectives_of_those_who_stay(tmp_path, name, own):
    schedule = hybrid({"type": "alternate", "pattern": {"es": 1, "sgd": 3}})
    estimators = schedule["estimators"]
    schedule = {**schedule, "estimators": {"es": estimators["es"], "sgd": estimators["backprop"]}}
    run = made(name, tmp_path, schedule, **REWARD)
    assert list(run.objectives) == own
    assert all(run.objectives[n].batch_size == 2 for n in own)


PHASES = [
    {"steps": 30, "schedule": {"type": "single", "estimator": "backprop"}},
    {"steps": 10, "schedule": {"type": "alternate", "pattern": {"es": 1, "backprop": 1}}},
]


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        ({"type": "alternate", "pattern": {"es": 1, "backprop": 3}}, {"es": 0.25, "backprop": 0.75}),
        (
            {"type": "blend", "weights": {"es": {"start": 1, "end": 0, "over": 9}, "backprop": 1.5}},
            {"es": 0.25, "backprop": 0.75},
        ),
        ({"type": "phases", "phases": PHASES}, {"backprop": 35 / 40, "es": 5 / 40}),
    ],
    ids=["turns", "ramp", "phases"],
)
def test_without_a_scheduler_all_act_in_every_step_by_their_share(tmp_path, schedule, weights):
    trusting = {**BOTH, "es": {**BOTH["es"], "trust": 0.5}}
    run = made("scheduler_off", tmp_path, {"estimators": trusting, "schedule": schedule})
    assert run.schedule.estimators["es"].trust is None  # all go through the optimizer together
    assert run.schedule.schedule.type == "blend"
    assert run.schedule.schedule.weights == pytest.approx(weights)


def test_the_order_is_swapped(tmp_path):
    turns = made("order_swapped", tmp_path, ALTERNATE).schedule.schedule
    assert list(turns.pattern.items()) == [("backprop", 3), ("es", 1)]
    ramp = hybrid({"type": "blend", "weights": {"es": {"start": 1, "end": 0, "over": 9}, "backprop": 1}})
    weights = made("order_swapped", tmp_path, ramp).schedule.schedule.weights
    assert (weights["es"].start, weights["es"].end, weights["es"].over, weights["backprop"]) == (0, 1, 9, 1)
    phases = made("order_swapped", tmp_path, hybrid({"type": "phases", "phases": PHASES})).schedule.schedule.phases
    assert [phase.steps for phase in phases] == [10, 30]


# ---------------------------------------------------------------- mistakes

OPEN_END = [PHASES[0], {"schedule": {"type": "single", "estimator": "es"}}]


@pytest.mark.parametrize(
    ("run", "study", "words"),
    [
        ({}, {"base": "nothing.yaml"}, ["base: nothing.yaml: no such file"]),
        ({}, {"reference": "basee"}, ["reference: 'basee' is no arm", "did you mean 'base'?"]),
        ({}, {"arms": {"a b": {}, "a-b": {}}}, ["arms: 'a b' and 'a-b' are alike as names of folders"]),
        ({}, {"arms": {"lora": {}}, "baselines": ["lora"]}, ["arms: 'lora' and 'lora' are alike"]),
        ({}, {"arms": {"a": {"training.stepz": 1}}}, ["arm 'a'", "training.stepz: unknown key"]),
        ({}, {"arms": {"a": {"trainin.batch_size": 1}}}, ["arms.a: 'trainin.batch_size' is not a field of a run file"]),
        ({}, {"changes": {"training.steps": 1}}, ["training.steps is settled by the study; write budgets: [{steps: ...}]"]),
        ({}, {"axes": {"training.seed": [1, 2]}}, ["axes.training.seed: training.seed is settled by the study; write seeds"]),
        ({}, {"axes": {"rank": [1, 2]}}, ["axes: rank is no field of a run file", "rank: {small:"]),
        ({}, {"axes": {"training.batch_size": []}}, ["axes: training.batch_size has no values"]),
        ({}, {"budgets": [{"seconds": 1, "steps": 1}]}, ["budgets.0: a study's budget is exactly one of"]),
        ({}, {"budgets": []}, ["budgets"]),
        ({}, {"budgets": [{"steps": 2}, {"steps": 2}]}, ["budgets: 2 steps is written twice"]),
        ({}, {"seeds": [1, 1]}, ["seeds: 1 is written twice"]),
        ({}, {"fit": [{"training.batch_size": 1}]}, ["fit is for budgets with peak_memory"]),
        ({}, {"baselines": ["adam"]}, ["baselines.0"]),
        ({}, {"learning_rates": {"type": "optuna", "low": 2, "high": 1}}, ["low 2.0 is not below high 1.0"]),
        ({"data": {**run_document(Path())["data"], "validation": None}}, {}, ["data.validation is missing"]),
        ({"schedule": hybrid({"type": "single", "estimator": "es"})}, {"baselines": ["order_swapped"]}, ["baselines: order_swapped needs"]),
        ({"schedule": hybrid({"type": "single", "estimator": "es"})}, {"baselines": ["scheduler_off"]}, ["scheduler_off needs a schedule of several"]),
        ({"schedule": hybrid({"type": "single", "estimator": "es"})}, {"baselines": ["stale_gradient"]}, ["stale_gradient needs a schedule of es and backprop"]),
        ({"schedule": hybrid({"type": "phases", "phases": OPEN_END})}, {"baselines": ["order_swapped"]}, ["length of the last phase"]),
        ({"schedule": hybrid({"type": "phases", "phases": OPEN_END})}, {"baselines": ["scheduler_off"]}, ["length of every phase"]),
    ],
)  # fmt: skip
def test_mistakes_are_explained_before_anything_runs(plan_of, tmp_path, run, study, words):
    with pytest.raises(UserError) as error:
        plan_of(run, **study)
    for word in words:
        assert word in str(error.value)
    assert "study.yaml" in str(error.value)
    assert not (tmp_path / "study").exists()
