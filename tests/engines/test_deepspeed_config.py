"""What an `engine` section and its DeepSpeed file say together."""

import json

import pytest
from pydantic import ValidationError

from hybrid_opt.config.engines import ZeroEngine
from hybrid_opt.config.estimators import Backprop
from hybrid_opt.engines.deepspeed_config import DeepSpeedSettings
from hybrid_opt.errors import UserError


@pytest.fixture
def settings(tmp_path):
    """DeepSpeedSettings of a file's content and the section's other fields."""

    def of(content=None, stage=2, **section) -> DeepSpeedSettings:
        if content is not None:
            section["deepspeed_config"] = str(tmp_path / "ds.json")
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / "ds.json").write_text(text)
        return DeepSpeedSettings(ZeroEngine(type="zero", zero_stage=stage, **section))

    return of


def backprop(**fields) -> Backprop:
    return Backprop(type="backprop", learning_rate=0.1, **fields)


def whole(settings: DeepSpeedSettings, dtype: str = "float32", ranks: int = 2, **fields) -> dict:
    return settings.deepspeed(settings.backprop(backprop(**fields)), dtype, ranks, hidden_size=100)


def test_a_file_may_be_written_in_place(settings):
    """As TrainingArguments has it; its keys are named as such."""
    content = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "gradient_clipping": 0.5}
    assert whole(settings(deepspeed_config=content)) == whole(settings(content))
    with pytest.raises(
        UserError, match=r"engine: deepspeed_config: gradient_clipping is 0.5, but backprop's gradient_clipping is 1"
    ):
        whole(settings(deepspeed_config=content), gradient_clipping=1.0)
    with pytest.raises(UserError, match=r"engine.deepspeed_config: offloading to nvme is not supported"):
        settings(deepspeed_config={"zero_optimization": {"offload_param": {"device": "nvme"}}})


# ------------------------------------------------------------ two places


@pytest.mark.parametrize(
    ("key", "in_file", "section", "place"),
    [
        ("gradient_accumulation_steps", 4, {"gradient_accumulation_steps": 2}, "engine.gradient_accumulation_steps"),
        ("gradient_clipping", 1.0, {"gradient_clipping": 0.5}, "engine.gradient_clipping"),
        ("train_micro_batch_size_per_gpu", 8, {"micro_batch_size": 4}, "engine.micro_batch_size"),
    ],
)
def test_a_file_that_contradicts_the_section_is_an_error_that_names_both(settings, key, in_file, section, place):
    with pytest.raises(UserError) as error:
        settings({key: in_file}, **section).backprop(backprop())
    assert place in str(error.value)
    assert f"ds.json: {key}" in str(error.value)


@pytest.mark.parametrize(
    ("key", "in_file", "own", "place"),
    [
        ("gradient_accumulation_steps", 4, {"accumulation": 2}, "backprop's accumulation"),
        ("gradient_accumulation_steps", 4, {"accumulation": 1}, "backprop's accumulation"),
        ("gradient_clipping", 1.0, {"gradient_clipping": 0.5}, "backprop's gradient_clipping"),
        ("train_micro_batch_size_per_gpu", 8, {"micro_batch_size": 4}, "backprop's micro_batch_size"),
    ],
)
def test_a_file_that_contradicts_the_schedule_is_an_error_that_names_both(settings, key, in_file, own, place):
    with pytest.raises(UserError) as error:
        settings({key: in_file}).backprop(backprop(**own))
    assert place in str(error.value)
    assert f"ds.json: {key}" in str(error.value)


def test_a_section_that_contradicts_the_schedule_is_an_error_that_names_both(settings):
    with pytest.raises(UserError, match=r"engine\.gradient_clipping is 0\.5, but backprop's gradient_clipping is 1\.0"):
        settings(gradient_clipping=0.5).backprop(backprop(gradient_clipping=1.0))


def test_another_stage_in_the_file_is_an_error_that_names_both(settings):
    with pytest.raises(UserError, match=r"engine\.zero_stage is 2, but .*ds\.json: zero_optimization\.stage is 3"):
        whole(settings({"zero_optimization": {"stage": 3}}))


def test_another_place_for_the_optimizer_in_the_file_is_an_error_that_names_both(settings):
    file = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    with pytest.raises(
        UserError, match=r"engine\.offload_optimizer\.device is \"cpu\", but .*offload_optimizer\.device"
    ):
        whole(settings(file, offload_optimizer={"device": "cpu"}))


def test_two_dtypes_in_the_file_are_an_error_that_names_both(settings):
    file = {"bf16": {"enabled": True}, "fp16": {"enabled": True}}
    with pytest.raises(UserError, match=r"bf16\.enabled is \"bfloat16\", but .*fp16\.enabled is \"float16\""):
        settings(file).dtype("float32", given=False)


@pytest.mark.parametrize("where", ["file", "section"])
def test_a_dtype_that_contradicts_the_models_is_an_error_if_the_model_was_told(settings, where):
    said = settings({"bf16": {"enabled": True}}) if where == "file" else settings(bf16=True)
    assert said.dtype("float32", given=False) == "bfloat16"
    with pytest.raises(UserError, match=r"model\.dtype is \"float32\", but .*bf16"):
        said.dtype("float32", given=True)


def test_bf16_false_contradicts_a_model_that_was_told_to_be_bfloat16(settings):
    with pytest.raises(UserError, match=r"model\.dtype is \"bfloat16\", but engine\.bf16"):
        settings(bf16=False).dtype("bfloat16", given=True)


def test_the_section_cannot_want_both_narrow_dtypes():
    with pytest.raises(ValidationError, match="bf16 and fp16 are both true"):
        ZeroEngine(type="zero", zero_stage=2, bf16=True, fp16=True)


def test_the_same_in_both_places_is_no_conflict(settings):
    file = {"gradient_clipping": 0.5, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    said = settings(file, gradient_clipping=0.5, bf16=True)
    assert said.backprop(backprop(gradient_clipping=0.5)).gradient_clipping == 0.5
    assert said.dtype("bfloat16", given=True) == "bfloat16"


# ------------------------------------------------------------ what the file settles


def test_accumulation_and_clipping_are_adopted_from_the_file(settings):
    adopted = settings({"gradient_accumulation_steps": 4, "gradient_clipping": 1.5}).backprop(backprop())
    assert (adopted.accumulation, adopted.micro_batch_size, adopted.gradient_clipping) == (4, None, 1.5)


def test_the_micro_batch_size_is_adopted_from_the_file(settings):
    adopted = settings({"train_micro_batch_size_per_gpu": 3}).backprop(backprop())
    assert (adopted.accumulation, adopted.micro_batch_size) == (1, 3)


def test_a_clipping_of_0_is_deepspeeds_way_to_say_none(settings):
    assert settings({"gradient_clipping": 0.0}).backprop(backprop()).gradient_clipping is None


def test_what_is_adopted_reaches_deepspeed(settings):
    config = whole(settings({"gradient_accumulation_steps": 4, "gradient_clipping": 1.5}), ranks=3)
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (4, 1.5)
    assert config["train_batch_size"] == 4 * 3 * config["train_micro_batch_size_per_gpu"]


def test_the_schedules_values_reach_deepspeed_without_a_file(settings):
    config = whole(settings(), accumulation=2, gradient_clipping=0.1)
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (2, 0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_reaches_deepspeed_beside_the_files_own_settings(settings, dtype):
    config = whole(settings({"fp16": {"enabled": "auto", "initial_scale_power": 8}}), dtype)
    assert config["bf16"]["enabled"] is (dtype == "bfloat16")
    assert config["fp16"] == {"enabled": dtype == "float16", "initial_scale_power": 8}


def test_without_a_word_the_dtype_is_the_models(settings):
    assert settings({"bf16": {"enabled": "auto"}}).dtype("bfloat16", given=True) == "bfloat16"
    assert settings().dtype("float16", given=False) == "float16"


def test_further_settings_reach_deepspeed_as_they_are(settings):
    file = {"wall_clock_breakdown": True, "zero_optimization": {"stage3_param_persistence_threshold": 7}}
    config = whole(settings(file, stage=3))
    assert config["wall_clock_breakdown"] is True
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 7
    assert config["zero_optimization"]["stage"] == 3


# ------------------------------------------------------------ auto


def test_auto_is_filled_in_everywhere(settings):
    auto = "auto"
    file = {
        "train_batch_size": auto,
        "train_micro_batch_size_per_gpu": auto,
        "gradient_accumulation_steps": auto,
        "gradient_clipping": auto,
        "bf16": {"enabled": auto},
        "fp16": {"enabled": auto, "initial_scale_power": auto},
        "optimizer": auto,
        "scheduler": auto,
        "zero_optimization": {"stage": auto, "reduce_bucket_size": auto, "stage3_max_live_parameters": auto},
    }
    config = whole(settings(file, stage=3), accumulation=2, gradient_clipping=0.5)
    assert auto not in json.dumps(config)
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (2, 0.5)
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["reduce_bucket_size"] == 100**2  # as in transformers, for a hidden size of 100


def test_a_bucket_size_of_ones_own_stays(settings):
    config = whole(settings({"zero_optimization": {"reduce_bucket_size": 1000}}))
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000


# ------------------------------------------------------------ batch sizes


def test_another_batch_size_in_the_file_is_an_error_that_names_both(settings):
    with pytest.raises(UserError, match=r"training\.batch_size is 16, but .*train_batch_size is 32"):
        settings({"train_batch_size": 32}).check_batch_size(16, ranks=2)


@pytest.mark.parametrize("where", ["file", "section"])
def test_parts_that_do_not_make_the_batch_are_an_error(settings, where):
    file = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    section = {"micro_batch_size": 4, "gradient_accumulation_steps": 2}
    said = settings(file) if where == "file" else settings(**section)
    said.check_batch_size(16, ranks=2)
    with pytest.raises(UserError, match=r"make a batch of 16, but training\.batch_size is 8"):
        said.check_batch_size(8, ranks=2)


# ------------------------------------------------------------ offloading


@pytest.mark.parametrize("null", [{}, {"offload_optimizer": None}, {"offload_optimizer": {"pin_memory": False}}])
def test_the_section_completes_what_the_file_says_of_offloading(settings, null):
    config = whole(settings({"zero_optimization": null}, offload_optimizer={"device": "cpu"}))
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


def test_offloading_counts_wherever_it_is_said(settings):
    in_file = settings({"zero_optimization": {"offload_param": {"device": "cpu"}}}, stage=3)
    in_section = settings(offload_optimizer={"device": "cpu"})
    assert [in_file.offloads(), in_file.offloads("offload_optimizer")] == [True, False]
    assert [in_section.offloads(), in_section.offloads("offload_optimizer")] == [True, True]
    assert not settings(offload_optimizer={"device": "none"}).offloads()
    assert not settings().offloads()


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_offloading_to_nvme_is_refused(settings, section):
    with pytest.raises(UserError, match=r"ds\.json: offloading to nvme is not supported"):
        settings({"zero_optimization": {section: {"device": "nvme", "nvme_path": "/tmp"}}})
    with pytest.raises(ValidationError):
        ZeroEngine(type="zero", zero_stage=3, **{section: {"device": "nvme"}})


def test_offloading_parameters_needs_stage_3(settings):
    with pytest.raises(ValidationError, match="offload_param needs zero_stage 3"):
        settings(offload_param={"device": "cpu"})


# ------------------------------------------------------------ files that cannot be used


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_the_optimizer_belongs_in_the_schedule_file(settings, section):
    with pytest.raises(UserError, match=rf"ds\.json: {section} belongs to the backprop estimator"):
        settings({section: {"type": "AdamW"}})


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"engine\.deepspeed_config: nowhere\.json: no such file"):
        DeepSpeedSettings(ZeroEngine(type="zero", zero_stage=1, deepspeed_config="nowhere.json"))


@pytest.mark.parametrize("text", ["{", "", "{'a': 1}"])
def test_bad_json_is_named(settings, text):
    with pytest.raises(UserError, match=r"ds\.json: cannot be read as JSON"):
        settings(text)


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("3", "int"), ("null", "NoneType")])
def test_json_that_is_no_object_is_named(settings, text, kind):
    with pytest.raises(UserError, match=rf"ds\.json: expected a JSON object, found {kind}"):
        settings(text)


@pytest.mark.parametrize("section", ["zero_optimization", "bf16", "fp16", "flops_profiler"])
def test_a_section_that_holds_no_keys_is_named(settings, section):
    with pytest.raises(UserError, match=rf"ds\.json: {section} must hold keys and values"):
        settings({section: True})


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            {"tensorboard": {"enabled": True, "output_path": "/tmp"}},
            "tensorboard would write outside the run's folder; .*report_to",
        ),
        ({"csv_monitor": {"enabled": True, "output_path": "../x"}}, "csv_monitor would write outside the run's folder"),
        ({"wandb": {}}, "wandb would write outside"),
        ({"comet": {}}, "comet would write outside"),
        (
            {"flops_profiler": {"enabled": True, "output_file": "/tmp/x"}},
            r"flops_profiler\.output_file would write outside",
        ),
        ({"autotuning": {"results_dir": "/tmp"}}, "autotuning is not among the sections"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint is not among the sections"),
        ({"compile": {"backend": "evil.backend"}}, "compile is not among the sections"),
        ({"torch_autocast": {"lower_precision_safe_modules": ["evil.X"]}}, "torch_autocast is not among the sections"),
        ({"data_efficiency": {}}, "data_efficiency is not among the sections"),
        ({"datastates_ckpt": {}}, "datastates_ckpt is not among the sections"),
        ({"zero_optimisation": {}}, r"zero_optimisation is not among .* \(did you mean 'zero_optimization'\?\)"),
    ],
)
def test_what_writes_elsewhere_or_runs_code_is_refused(settings, file, message):
    with pytest.raises(UserError, match=rf"^engine\.deepspeed_config: .*ds\.json: {message}"):
        settings(file)


def test_what_only_prints_is_passed_on(settings):
    file = {
        "flops_profiler": {"enabled": True, "output_file": None},
        "comms_logger": {"enabled": True},
        "dump_state": True,
    }
    config = whole(settings(file))
    assert {key: config[key] for key in file} == file


def test_a_path_that_is_not_used_is_no_harm(settings):
    settings({"zero_optimization": {"offload_optimizer": {"device": "none", "nvme_path": "/local_nvme"}}})


@pytest.mark.parametrize("text", ['{"a": ' + "[" * 100_000, '{"gradient_clipping": ' + "9" * 5000 + "}"])
def test_json_without_end_is_named(settings, text):
    with pytest.raises(UserError, match=r"ds\.json: cannot be read as JSON"):
        settings(text)


def test_the_file_itself_is_not_changed(settings):
    said = settings({"zero_optimization": {"stage": "auto"}})
    whole(said)
    assert said.file == {"zero_optimization": {"stage": "auto"}}
