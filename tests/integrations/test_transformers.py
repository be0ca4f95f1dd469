"""transformers' Trainer with a schedule: the same weights as Trainer's where the schedule is backprop alone, and as a loop's of one's own where
it is not; and what Trainer does around the steps."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)

from hybrid_opt import HybridOptimizer, UserError
from hybrid_opt.integrations.label_losses import LabelLosses
from hybrid_opt.integrations.step_batches import joined
from hybrid_opt.integrations.training_arguments import engine_of
from hybrid_opt.integrations.transformers import HybridTrainer, HybridTraining
from tests.conftest import tiny_model
from tests.integrations.zero_trainer import ES, SCHEDULE, arguments, collate, rows
from tests.launching import launch

ADAMW = {"type": "backprop", "learning_rate": 1, "optimizer_arguments": {"weight_decay": 0.0}, "gradient_clipping": 1.0}
BACKPROP = {"estimators": {"backprop": ADAMW}, "schedule": {"type": "single", "estimator": "backprop"}}
ONLY_ES = {"estimators": {"es": ES}, "schedule": {"type": "single", "estimator": "es"}}
ALL = {**SCHEDULE, "policy": [{"match": ".*", "use": ["es", "backprop"]}]}


def trainer(model, output, *, schedule=ALL, kind=HybridTrainer, changes=None, **options):
    own = {"train_dataset": rows(), "eval_dataset": rows(8), "data_collator": collate}
    if issubclass(kind, HybridTraining):
        own["schedule"] = schedule
    return kind(model, arguments(output, **(changes or {})), **{**own, **options})


def largest_difference(a, b) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters(), strict=True))


def with_class_labels(examples):
    batch = collate(examples)
    return {**batch, "labels": batch["input_ids"][:, 0] % 3}


@pytest.mark.parametrize(
    ("kind", "head", "collator", "more"),
    [
        ("llama", AutoModelForCausalLM, collate, {}),
        ("bert", AutoModelForMaskedLM, collate, {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
        ("llama", AutoModelForSequenceClassification, with_class_labels, {"num_labels": 3, "pad_token_id": 0}),
    ],
)
def test_backprop_alone_is_transformers_trainer(tmp_path, kind, head, collator, more):
    """With what the arguments say of the optimizer, and tokens weighed over the whole step's batch."""
    net = tiny_model(kind, head, **more)
    own = copy.deepcopy(net)
    parts = (
        2 if kind == "llama" and head is AutoModelForCausalLM else 1
    )  # of others transformers weighs all parts alike
    changes = {
        "gradient_accumulation_steps": parts, "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.5, "adam_epsilon": 1e-3, "adam_beta1": 0.8,
    }  # fmt: skip
    Trainer(
        net,
        arguments(tmp_path / "theirs", **changes),
        train_dataset=rows(),
        eval_dataset=rows(8),
        data_collator=collator,
    ).train()
    ours = trainer(own, tmp_path / "ours", schedule=BACKPROP, changes=changes, data_collator=collator)
    ours.train()
    assert isinstance(ours.objective, LabelLosses)
    assert largest_difference(net, own) < 2e-6
    assert largest_difference(own, tiny_model(kind, head, **more)) > 1e-3
    logs = [
        json.loads((tmp_path / f"{who}/checkpoint-6/trainer_state.json").read_text())["log_history"]
        for who in ("theirs", "ours")
    ]
    for theirs, mine in zip(*logs, strict=True):
        for key in ("loss", "learning_rate", "eval_loss", "epoch"):
            assert mine.get(key) == pytest.approx(theirs.get(key), abs=1e-5)


def test_a_schedule_does_what_it_does_in_a_loop_of_ones_own(tmp_path):
    net = tiny_model()
    own = copy.deepcopy(net)
    changes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "eval_strategy": "no"}
    run = trainer(net, tmp_path, changes=changes)
    seen = []
    run.data_collator = lambda examples: seen.append(collate(examples)) or seen[-1]
    run.train()
    loop = HybridOptimizer(own, LabelLosses(own), schedule=ALL, seed=42)  # Trainer's default
    for batch in seen[:6]:  # the data loader is a batch ahead
        loop.step(batch)
    assert largest_difference(net, own) == 0
    assert run.report.costs["backprop"].backwards == 1


def test_a_resumed_run_is_the_same(tmp_path):
    """ES's momentum, backprop's, and the anchor's first weights included."""
    es = {**ES, "anchor": 0.1}
    schedule = {**ALL, "estimators": {**ALL["estimators"], "es": es}}
    whole = trainer(tiny_model(), tmp_path / "whole", schedule=schedule)
    whole.train()
    rest = trainer(tiny_model(), tmp_path / "rest", schedule=schedule)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    assert largest_difference(whole.model, rest.model) == 0
    for run in (whole, rest):
        assert [row["total_forwards"] for row in run.state.log_history if "loss" in row] == [4, 5, 9, 10, 14, 15]
    again = trainer(tiny_model(), tmp_path / "whole", schedule=schedule)  # a second run in the same folder
    again.train()
    assert largest_difference(whole.model, again.model) == 0
    again.train()  # from where the first one has ended, its estimators anew
    assert again.hybrid.signals.step == 6


@pytest.mark.parametrize(
    ("changes", "schedule", "message"),
    [
        ({"seed": 7}, ALL, "because seed was 42 and is now 7"),
        (
            {},
            {**ALL, "estimators": {**ALL["estimators"], "es": {**ES, "sigma": 0.5}}},
            "schedule.estimators.es.sigma was 0.02 and is now 0.5",
        ),
        ({}, "mezo", "schedule.estimators.backprop.* was .* and is now None"),
    ],
)
def test_a_checkpoint_of_another_setup_is_refused(tmp_path, changes, schedule, message):
    trainer(tiny_model(), tmp_path).train()
    with pytest.raises(UserError, match=message):
        trainer(tiny_model(), tmp_path, schedule=schedule, changes=changes).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
    trainer(tiny_model(), tmp_path, changes={"learning_rate": 1e-3}).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )


def test_a_warm_up_alone_is_that_of_the_default_schedule(tmp_path):
    run = trainer(tiny_model(), tmp_path, schedule=BACKPROP, changes={"warmup_steps": 2, "learning_rate": 1e-2})
    run.train()
    rates = [row["learning_rate"] for row in run.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.0075, 0.005, 0.0025])


def test_a_loss_that_is_no_tensor(tmp_path):
    class Wrong(HybridTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 1.0

    with pytest.raises(
        UserError, match=r"compute_loss: it must return the mean loss as a tensor of no dimensions, not 1.0"
    ):
        trainer(tiny_model(), tmp_path, kind=Wrong).train()


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    Trainer(
        tiny_model(), arguments(tmp_path), train_dataset=rows(), eval_dataset=rows(8), data_collator=collate
    ).train()
    with pytest.raises(UserError, match="was not saved by a HybridTrainer"):
        trainer(tiny_model(), tmp_path).train(resume_from_checkpoint=True)


class Counting(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append("step")

    def on_substep_end(self, args, state, control, **kwargs):
        self.events.append("substep")

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append(round(metrics["eval_loss"], 3))

    def on_save(self, args, state, control, **kwargs):
        self.events.append("save")


def test_callbacks_evaluation_and_rotation(tmp_path):
    counting = Counting()
    changes = {"save_steps": 1, "eval_steps": 1, "save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "max_steps": 12}  # fmt: skip
    run = trainer(tiny_model(), tmp_path, changes=changes, callbacks=[counting, EarlyStoppingCallback(8)])
    run.train()
    losses = [event for event in counting.events if isinstance(event, float)]
    assert (
        counting.events.count("substep")
        == counting.events.count("step")
        == counting.events.count("save")
        == run.state.global_step
    )
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-3)
    found = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    assert largest_difference(found, run.model) == 0


@pytest.mark.parametrize("sets", [rows(8), {"a": rows(8), "b": rows(4)}], ids=["one", "several"])
def test_triggers_learn_the_validation_loss(tmp_path, sets):
    schedule = {
        "estimators": ALL["estimators"],
        "schedule": {
            "type": "phases",
            "phases": [
                {
                    "until": {"signal": "validation_loss", "below": 100},
                    "schedule": {"type": "single", "estimator": "es"},
                },
                {"steps": 10, "schedule": {"type": "single", "estimator": "backprop"}},
            ],
        },
    }
    run = trainer(tiny_model(), tmp_path, schedule=schedule, eval_dataset=sets)
    run.train()
    rows_ = [row for row in run.state.log_history if "loss" in row]
    assert ["es/loss" in row for row in rows_] == [True] * 3 + [False] * 3  # evaluated after three steps


def test_an_adaptive_schedule_measures_on_probe_rows(tmp_path):
    schedule = {
        "estimators": ALL["estimators"],
        "schedule": {"type": "adaptive", "estimators": ["es", "backprop"], "block": 3, "per": "forward_equivalent"},
    }
    run = trainer(tiny_model(), tmp_path, schedule=schedule, probe_dataset=rows(8))
    run.train()
    acted = ["es" if "es/loss" in row else "backprop" for row in run.state.log_history if "loss" in row]
    assert acted[:2] == ["es", "backprop"]
    assert run.hybrid.schedule.arms["backprop"].weight > 0
    assert run._probe_loss() == pytest.approx(run.evaluate(rows(8))["eval_loss"], abs=1e-5)
    with pytest.raises(UserError, match="probe_dataset"):
        trainer(tiny_model(), tmp_path, schedule=schedule).train()


class WithMargin(HybridTrainer):
    """A loss of its own, one number for a batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return (loss, outputs) if return_outputs else loss


def test_a_loss_of_ones_own_is_asked_a_member_at_a_time(tmp_path):
    """It happens to be the model's, so the weights are those of the losses by example, but for rounding divided by sigma."""
    own, known = (trainer(tiny_model(), tmp_path / kind.__name__, kind=kind) for kind in (WithMargin, HybridTrainer))
    own.train()
    known.train()
    assert own.objective is None
    assert largest_difference(own.model, known.model) < 1e-4
    assert largest_difference(own.model, tiny_model()) > 1e-2


def test_a_loss_function_of_ones_own_gets_the_number_of_labels(tmp_path):
    def by_tokens(outputs, labels, num_items_in_batch=None):
        kept = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
        return kept / num_items_in_batch

    net = tiny_model()
    own = copy.deepcopy(net)
    changes = {"learning_rate": 1e-2, "adam_epsilon": 1e-3, "lr_scheduler_type": "cosine", "eval_strategy": "no"}
    trainer(net, tmp_path / "theirs", kind=Trainer, changes=changes, compute_loss_func=by_tokens).train()
    ours = trainer(own, tmp_path / "ours", schedule=BACKPROP, changes=changes, compute_loss_func=by_tokens)
    ours.train()
    assert ours.objective is None
    assert largest_difference(net, own) < 2e-6


def test_label_smoothing_is_trainers_own(tmp_path):
    net = tiny_model()
    own = copy.deepcopy(net)
    changes = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "adam_epsilon": 1e-3, "lr_scheduler_type": "cosine"}  # fmt: skip
    trainer(net, tmp_path / "theirs", kind=Trainer, changes=changes).train()
    ours = trainer(own, tmp_path / "ours", schedule=BACKPROP, changes=changes)
    ours.train()
    assert ours.objective is None
    assert largest_difference(net, own) < 2e-6


def test_batches_without_labels(tmp_path):
    run = trainer(tiny_model(), tmp_path, changes={"eval_strategy": "no"})
    run.data_collator = lambda examples: {key: value for key, value in collate(examples).items() if key != "labels"}
    with pytest.raises(
        UserError, match="the batch has no labels, only input_ids, attention_mask; use one that adds them"
    ):
        run.train()
    nothing = {**collate(rows(2)), "labels": torch.full((2, 9), -100)}
    assert LabelLosses(run.model).losses(run.model, nothing).tolist() == [0, 0]


def test_a_function_of_losses(tmp_path):
    def losses(model, batch):
        return model(batch["input_ids"], batch["attention_mask"]).logits.square().mean((1, 2))

    changes = {"eval_strategy": "no", "learning_rate": 1e-3}
    run = trainer(tiny_model(), tmp_path, objective=losses, schedule=BACKPROP, changes=changes)
    first = losses(run.model, collate(rows(8))).mean().item()
    run.train()
    assert losses(run.model, collate(rows(8))).mean().item() < first


def test_peft_checkpointing_and_narrow_weights_are_as_ever(tmp_path):
    from peft import LoraConfig, get_peft_model

    weights = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        adapted = get_peft_model(
            tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )
        place = tmp_path / str(checkpointing)
        run = trainer(adapted, place, changes={"gradient_checkpointing": checkpointing})
        run.train()
        assert isinstance(run.objective, LabelLosses)
        weights[checkpointing] = load_file(place / "checkpoint-6/adapter_model.safetensors")
        assert not (place / "checkpoint-6/model.safetensors").exists()
        base = dict(tiny_model().named_parameters())
        for name, p in run.model.get_base_model().named_parameters():
            if "lora" not in name:
                assert torch.equal(p, base[name.replace(".base_layer", "")])
    assert weights[True].keys() == weights[False].keys()
    assert all(torch.allclose(weights[True][key], weights[False][key], atol=1e-5) for key in weights[True])
    assert any(value.abs().max() > 1e-3 for key, value in weights[True].items() if "lora_B" in key)


def test_bfloat16_arguments(tmp_path):
    """Weights stay in float32, forward passes are made in bfloat16."""
    run = trainer(tiny_model(), tmp_path, changes={"bf16": True})
    run.train()
    assert next(run.model.parameters()).dtype == torch.float32
    exact = trainer(tiny_model(), tmp_path, changes={})
    exact.train()
    assert 1e-6 < largest_difference(run.model, exact.model) < 0.1


def test_uploads_are_trainers_own(tmp_path, monkeypatch):
    uploaded = {}

    def upload_folder(**what):
        uploaded.update(what, files={path.name for path in tmp_path.joinpath("out").iterdir()})

    hub = SimpleNamespace(create_repo=lambda *a, **k: SimpleNamespace(repo_id="me/tiny"), upload_folder=upload_folder)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    run = trainer(
        tiny_model(), tmp_path / "out", changes={"push_to_hub": True, "hub_model_id": "me/tiny", "save_strategy": "no"}
    )
    run.train()
    run.push_to_hub()
    assert uploaded["repo_id"] == "me/tiny"
    assert {"model.safetensors", "config.json", "README.md"} <= uploaded["files"]


def test_trl_can_mix_it_in(tmp_path):
    """The same loss as SFTTrainer's own, and what it measures along the way is of the weights, not of perturbed ones."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    from tests.conftest import GLASS

    class HybridSFTTrainer(HybridTraining, trl.SFTTrainer):
        pass

    data = Dataset.from_list([{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(32)])
    found = {}
    for kind in (trl.SFTTrainer, HybridSFTTrainer):
        net = tiny_model(vocab_size=1024)
        args = trl.SFTConfig(
            output_dir=str(tmp_path / kind.__name__), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=1,
            report_to="none", use_cpu=True, learning_rate=1e-2, lr_scheduler_type="constant_with_warmup", adam_epsilon=1e-3, bf16=False,
            gradient_checkpointing=False, disable_tqdm=True, eval_strategy="steps", eval_steps=4,
        )  # fmt: skip
        more = {"schedule": BACKPROP, "objective": LabelLosses(net)} if kind is HybridSFTTrainer else {}
        run = kind(
            net,
            args=args,
            train_dataset=data,
            eval_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(GLASS),
            **more,
        )
        run.train()
        found[kind] = run
    theirs, ours = found.values()
    assert largest_difference(theirs.model, ours.model) < 2e-6
    logs = [[row for row in run.state.log_history if "eval_loss" in row] for run in (theirs, ours)]
    assert logs[1][0]["eval_loss"] == pytest.approx(logs[0][0]["eval_loss"], abs=1e-5)
    assert logs[1][0]["eval_mean_token_accuracy"] == pytest.approx(logs[0][0]["eval_mean_token_accuracy"])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"fp16": True}, {}, "TrainingArguments: fp16: float16 needs its losses scaled"),
        ({"auto_find_batch_size": True}, {}, "TrainingArguments: auto_find_batch_size: .*memory_budget="),
        ({"optim": "sgd", "adam_beta1": 0.8}, {}, "TrainingArguments: adam_beta1: backprop's optimizer is SGD, which has no such option"),
        ({"optim": "lomo"}, {}, "TrainingArguments: optim: 'lomo' is not one of adamw_torch"),
        ({"learning_rate": 1e-3}, {"schedule": ONLY_ES}, "learning_rate: this schedule has no backprop.* write learning_rate of .*(es)"),
        ({"warmup_steps": 3, "lr_scheduler_type": "constant"}, {}, "learning_rate_schedule 'constant' has no warm-up"),
        ({}, {"memory_budget": "20 GX"}, "memory_budget: '20 GX' is no size"),
        ({}, {"schedule": "alternat"}, "alternate"),
        ({}, {"optimizers": (torch.optim.SGD([torch.zeros(1)], lr=1), None)}, "optimizers: the schedule says"),
        ({"max_steps": -1, "num_train_epochs": 1}, {"schedule": {**ALL, "policy": [{"match": "nothing", "use": ["es"]}]}}, "nothing"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(tmp_path, changes, options, message):
    with pytest.raises(UserError, match=message):
        trainer(tiny_model(), tmp_path, changes=changes, **options).train()


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        ({"world_size": 2}, "the launcher started 2 processes, .* pass deepspeed="),
        ({"n_gpu": 4}, "4 devices are visible to one process"),
        ({"deepspeed": {"zero_optimization": {"stage": 0}}}, "zero_optimization.stage is 0, which keeps no float32 master"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}}, "optimizer belongs to the backprop estimator"),
    ],
)  # fmt: skip
def test_processes_that_cannot_work_together_are_refused(processes, message):
    """Asked without TrainingArguments, which would join the processes."""
    with pytest.raises(UserError, match=message):
        engine_of(SimpleNamespace(**{"deepspeed": None, "world_size": 1, "n_gpu": 0, **processes}))


def test_labels_of_other_models_are_not_guessed():
    with pytest.raises(ValueError, match="is not known by example"):
        LabelLosses(torch.nn.Linear(2, 2))
    assert not LabelLosses.knows(tiny_model("llama", output_router_logits=True))
    assert not LabelLosses.knows(tiny_model("t5", AutoModelForSeq2SeqLM))
    assert LabelLosses.knows(tiny_model("gpt2"))
    replaced = tiny_model()
    replaced.loss_function = lambda logits, labels, vocab_size, **more: logits.square().mean()
    assert not LabelLosses.knows(replaced)


@pytest.mark.parametrize(
    ("labels", "more"),
    [
        (torch.tensor([0, 2]), {"num_labels": 3}),
        (torch.tensor([0.5, -1.0]), {"num_labels": 1}),
        (torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), {"num_labels": 3}),
    ],
)
def test_labels_of_examples_are_taken_as_transformers_takes_them(labels, more):
    net = tiny_model("llama", AutoModelForSequenceClassification, pad_token_id=0, **more).eval()
    batch = {**collate(rows(2)), "labels": labels}
    ours = LabelLosses(net).losses(net, batch)
    assert ours.shape == (2,)
    assert ours.mean().item() == pytest.approx(net(**batch).loss.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "head", "keys", "pad"),
    [
        ("llama", AutoModelForSequenceClassification, ("input_ids",), 2),  # looks for the last token that is no padding
        ("bert", AutoModelForMaskedLM, ("input_ids", "labels"), 0),  # looks at all tokens that no mask hides
    ],
)
def test_rows_that_are_filled_up_have_the_losses_that_they_had(kind, head, keys, pad):
    net = tiny_model(kind, head, pad_token_id=pad)
    batches = [{key: collate(rows(n)[n - 1 :])[key] for key in ("input_ids", "labels")} for n in (1, 5)]
    if "labels" not in keys:
        batches = [{**batch, "labels": torch.tensor([1])} for batch in batches]
    alone = torch.cat(
        [LabelLosses(net).losses(net, batch) / LabelLosses(net).shares(batch["labels"]) for batch in batches]
    )
    whole = joined(batches, pad)
    together = LabelLosses(net).losses(net, whole) / LabelLosses(net).shares(whole["labels"])
    assert torch.allclose(together, alone, atol=1e-5)


def test_long_and_short_examples_have_their_own_means():
    """Each side's loss is the model's own of its rows, whatever the other side's lengths are."""
    net = tiny_model()
    schedule = {**ALL, "schedule": {"type": "by_length", "long": "es", "short": "backprop", "length_threshold": 10}}
    optimizer = HybridOptimizer(net, LabelLosses(net), schedule=schedule)
    batch = collate(rows(8))
    sides = {name: {key: value[own] for key, value in batch.items()} for name, own in (("backprop", batch["attention_mask"].sum(1) <= 10), ("es", batch["attention_mask"].sum(1) > 10))}  # fmt: skip
    own = {name: net(**side).loss.item() for name, side in sides.items()}
    report = optimizer.step(batch)
    assert report.costs["backprop"].loss == pytest.approx(own["backprop"], abs=1e-5)
    assert report.costs["es"].loss == pytest.approx(own["es"], abs=0.1)  # the members' mean


def test_rows_of_several_examples_are_refused():
    with pytest.raises(UserError, match=r"batches with cu_seq_lens_q hold several examples in a row.* packing=False"):
        joined([{"input_ids": torch.zeros(1, 8), "cu_seq_lens_q": torch.zeros(3)}])


def test_parts_of_a_step_are_joined():
    parts = [collate(rows(2)), collate(rows(5)[3:]), {**collate(rows(1))}]
    whole = joined(parts)
    assert whole["input_ids"].shape == (5, 12)
    assert torch.equal(whole["labels"][0, :8], parts[0]["labels"][0, :8])
    assert whole["labels"][0, 9:].tolist() == [-100] * 3
    assert whole["attention_mask"].sum() == sum(part["attention_mask"].sum() for part in parts)
    assert joined([{"names": ["a"], "n": 3}, {"names": ["b"], "n": 3}]) == {"names": ["a", "b"], "n": 3}
    with pytest.raises(UserError, match="differ in their keys"):
        joined([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}])
    with pytest.raises(UserError, match=r"pixels has shapes \(1, 2, 3\), \(1, 2, 4\)"):
        joined([{"pixels": torch.zeros(1, 2, 3)}, {"pixels": torch.zeros(1, 2, 4)}])


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What two ranks did at each stage."""
    folder = tmp_path_factory.mktemp("zero")
    tiny_model().save_pretrained(folder / "model")
    assert not (problem := launch(2, folder, "tests.integrations.zero_trainer", folder, folder / "model")), problem
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_under_zero_are_one_process(launched, tmp_path, stage):
    one = trainer(tiny_model(), tmp_path, schedule=SCHEDULE)
    one.train()
    known = one.model.state_dict()
    two, resumed = (load_file(launched / f"zero{stage}{name}/final/model.safetensors") for name in ("", "-resumed"))
    assert two.keys() <= known.keys()
    assert max((two[name] - known[name]).abs().max().item() for name in two) < 2e-5
    assert all(torch.equal(two[name], resumed[name]) for name in two)
    history = json.loads((launched / f"zero{stage}/state0.json").read_text())["log_history"]
    for theirs, mine in zip(history, one.state.log_history, strict=True):
        for key in ("loss", "eval_loss", "es/loss", "total_forwards"):
            assert theirs.get(key) == pytest.approx(mine.get(key), abs=1e-4)
