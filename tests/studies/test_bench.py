"""What `hybrid-opt bench` reports, the loop it compares with, and what it refuses."""

import json
import os
import signal
import statistics
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybrid_opt import cli
from hybrid_opt.config import load_schedule
from hybrid_opt.objectives.causal_lm import CausalLmObjective
from hybrid_opt.scheduling.schedule import plan_of
from hybrid_opt.studies import bench, bench_rows
from hybrid_opt.studies.bench_generation import begun_alike, rewarded
from hybrid_opt.studies.bench_memory import row_memory
from hybrid_opt.studies.bench_plan import GENERATION_ROWS, MEMBER_ROWS, ROWS, Case, plan_cases, plan_rows
from hybrid_opt.studies.bench_rows import build_schedule, build_step, load_for, random_tokens, token_batch
from hybrid_opt.studies.mezo_loop import mezo_step
from tests.conftest import tiny_model, token_losses
from tests.conftest import token_batch as other_batch

SMALL = ("--members", "6", "--batch", "1", "--tokens", "8", "--repeats", "2", "--device", "cpu")
FEW = ("--rows", "es_low_rank", "--rows", "mezo_loop")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny llama, saved without a tokenizer."""
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def case(folder) -> Case:
    return plan_cases(str(folder), ["float32"], [6], [2], [8], device="cpu")[0]


def exit_code(monkeypatch, *arguments: str) -> int:
    """What the command line exits with."""
    monkeypatch.setattr(sys, "argv", ["hybrid-opt", "bench", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


def measured(monkeypatch, folder: Path, *arguments: str) -> dict[str, dict]:
    """The rows by name that the command writes for a model in a folder."""
    file = folder.parent / "bench.json"
    assert exit_code(monkeypatch, str(folder), *SMALL, "--json", str(file), *arguments) == 0
    assert [path.name for path in folder.parent.glob("*bench.json*")] == ["bench.json"]
    return {row["name"]: row for row in json.loads(file.read_text())}


# ---------------------------------------------------------------- MeZO


def noise(seed: int, model: torch.nn.Module) -> list[torch.Tensor]:
    """A direction, one tensor a parameter."""
    generator = torch.Generator().manual_seed(seed)  # the same stream as the global generator's
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]


def loss_at(start: list[torch.Tensor], direction: list[torch.Tensor], distance: float, batch) -> float:
    model = tiny_model().to(start[0].dtype)
    with torch.no_grad():
        for p, w, z in zip(model.parameters(), start, direction, strict=True):
            p.copy_(w + distance * z)
        return token_losses(model, batch).mean().item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_mezo_is_the_explicit_sum_over_its_pairs(dtype, tolerance):
    """Projected gradients from fresh copies of the model, the update from noise drawn anew."""
    model, batch, seeds, sigma, rate = tiny_model().to(dtype), other_batch(), [3, 1, 9], 1e-3, 1e-3
    start = [p.detach().clone() for p in model.parameters()]
    with torch.random.fork_rng():
        gradients = mezo_step(list(model.parameters()), lambda: token_losses(model, batch).mean(), seeds, sigma, rate)
    update = [torch.zeros_like(w) for w in start]
    for seed, gradient in zip(seeds, gradients, strict=True):
        z = noise(seed, model)
        slow = (loss_at(start, z, sigma, batch) - loss_at(start, z, -sigma, batch)) / (2 * sigma)
        assert gradient == pytest.approx(slow, abs=1e-9 if dtype == torch.float64 else 5e-3)
        update = [u - rate / 3 * gradient * part for u, part in zip(update, z, strict=True)]
    assert max(u.abs().max() for u in update) > 1e-4
    for p, w, u in zip(model.parameters(), start, update, strict=True):
        assert (p - (w + u)).abs().max() < tolerance


# ---------------------------------------------------------------- rows


def test_the_loss_is_that_of_every_token_but_the_first(case):
    model = load_for("inference", case)
    batch = token_batch(case, model, 3)
    ids = batch["input_ids"]
    assert ids.shape == (6, 8)
    assert torch.equal(ids, ids[:2].repeat(3, 1))
    losses = CausalLmObjective().losses(model, batch)
    assert torch.allclose(losses, token_losses(model, {"input_ids": ids}), atol=1e-5)


def test_inference_is_the_plain_model_on_all_members_rows(case):
    model = load_for("inference", case)
    logits = build_step("inference", case, model)()
    with torch.no_grad():
        plain = model(input_ids=token_batch(case, model, 6)["input_ids"]).logits
    assert logits.shape[1] >= 7  # all that the loss needs: the last token's predict nothing
    assert torch.allclose(logits, plain[:, : logits.shape[1]], atol=1e-5)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_row_finds_the_weights_that_the_one_before_found(case):
    """Even where a row ruins them: MeZO at a learning rate of a million."""
    rows = bench._Rows(case)
    before = {name: p.detach().clone() for name, p in rows.model.named_parameters()}
    rows.build("backprop_adamw")
    rows.steps["mezo_loop"] = lambda: mezo_step(list(rows.model.parameters()), lambda: torch.rand(()), [1], 1.0, 1e6)
    for name in ("mezo_loop", "backprop_adamw"):
        with torch.random.fork_rng():
            assert rows.seconds(name) > 0
        assert all(torch.equal(p, before[name]) for name, p in rows.model.named_parameters())


@pytest.mark.parametrize("row", [row for row in (*ROWS, *GENERATION_ROWS) if row not in ("inference", "generate")])
def test_a_step_moves_the_weights(row, case):
    model = load_for(row, case)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.random.fork_rng():
        build_step(row, case, model)()
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) // (4 if row == "lora" else 2)  # the rest, by less than float32 can hold


# ---------------------------------------------------------------- rows that write


class Passes:
    """The rows and tokens that a layer gets in each pass."""

    def __init__(self, layer: torch.nn.Module):
        self.shapes: list[tuple[int, int]] = []
        layer.register_forward_pre_hook(lambda _, args, kwargs: self.shapes.append(args[0].shape[:2]), with_kwargs=True)


def test_a_step_writes_what_generate_writes_if_members_hardly_differ(case, monkeypatch):
    """To the last token, although the first that is written is one that the model's makers say ends a text."""
    monkeypatch.setattr(bench_rows, "SIGMA", 1e-9)
    model, case = load_for("generate", case), replace(case, new_tokens=5)
    prompts = random_tokens(case, model)
    model.generation_config.eos_token_id = model(input_ids=prompts).logits[0, -1].argmax().item()
    whole = build_step("generate", case, model)()
    assert whole.shape == (12, 13)
    assert torch.equal(whole[:, :8], prompts.repeat(6, 1))
    texts = []
    monkeypatch.setattr(bench_rows, "rewarded", lambda *arguments: recorded(*arguments, texts))
    passes = Passes(model.model.layers[0])
    build_step("es_generate", case, model)()
    assert texts == [" ".join(map(str, row)) for row in whole[:, 8:].tolist()]
    assert passes.shapes[-5:] == [(12, 8), *[(12, 1)] * 4]  # after the rehearsal


def recorded(prompts, new_tokens, texts):
    """The objective and batch of a row, whose judge also notes what it is shown."""
    objective, batch = rewarded(prompts, new_tokens)
    (judge,) = objective.judges.judges

    def function(completions, **columns):
        texts.extend(completions)
        return judge.function(completions, **columns)

    objective.judges.judges = [replace(judge, function=function)]
    return objective, batch


def test_members_write_in_one_pass_however_long_their_prompts(folder):
    """64 rows of 32 tokens are more than a pass that reads takes, 1024 tokens, and fewer than one that writes."""
    case = plan_cases(str(folder), ["float32"], [16], [4], [32], new_tokens=[2], device="cpu")[0]
    model = load_for("es_generate", case)
    passes, step = Passes(model.model.layers[0]), build_step("es_generate", case, model)
    step()
    assert passes.shapes[-2:] == [(64, 32), (64, 1)]


def test_rows_read_in_common_what_they_say(tmp_path):
    """In the second step: the first shows which layers members share."""
    tiny_model(num_hidden_layers=3).save_pretrained(tmp_path)
    case = plan_cases(str(tmp_path), ["float32"], [6], [2], [24], new_tokens=[2], device="cpu")[0]
    found = {}
    for row in GENERATION_ROWS[1:]:
        model = load_for(row, case)
        passes, step = Passes(model.model.layers[0]), build_step(row, case, model)
        step()
        passes.shapes.clear()
        step()
        found[row] = passes.shapes
    assert found["es_generate"] == [(12, 24), (12, 1)]
    assert found["es_generate_shared"] == [(2, 24), (12, 1)]
    assert found["es_generate_common"] == [(6, 18), (12, 6), (12, 1)]
    prompts = torch.arange(24).view(3, 8)
    assert begun_alike(prompts)[1].tolist() == [0, 1, 2, 3, 4, 5, 14, 15]


def test_only_the_last_layers_move_where_the_others_are_shared(tmp_path):
    tiny_model(num_hidden_layers=3).save_pretrained(tmp_path)
    case = plan_cases(str(tmp_path), ["float32"], [6], [2], [8], new_tokens=[2], device="cpu")[0]
    model = load_for("es_generate_shared", case)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    build_step("es_generate_shared", case, model)()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[2] for name in moved} == {"1", "2"}


def test_rows_that_write_are_compared_with_generate(folder, monkeypatch, capsys):
    """A new token is one of members * examples * new_tokens."""
    arguments = ("--rows", "es_generate", "--new-tokens", "3", "--no-memory")
    rows = measured(monkeypatch, folder, *arguments)
    assert list(rows) == ["generate", "es_generate"]
    for row in rows.values():
        assert (row["reference"], row["new_tokens"], row["problem"]) == ("generate", 3, None)
        assert row["tokens_per_second"] == pytest.approx(18 / row["seconds_median"])
        assert row["evaluations_per_second"] == pytest.approx(6 / row["seconds_median"])
        paired = [g / s for g, s in zip(rows["generate"]["seconds"], row["seconds"], strict=True)]
        assert row["ratio_to_generate"] == pytest.approx(statistics.median(paired))
        assert "ratio_to_inference" not in row
    shown = capsys.readouterr().out
    assert "6 members x 1 examples x 8 tokens + 3 new" in shown
    assert "ratio: generate's seconds by the row's" in shown
    rows = measured(monkeypatch, folder, *arguments, "--rows", "mezo_loop")
    assert [(row["name"], row["reference"]) for row in rows.values()] == [
        ("inference", "inference"), ("mezo_loop", "inference"), ("generate", "generate"), ("es_generate", "generate"),
    ]  # fmt: skip
    assert rows["mezo_loop"]["new_tokens"] is None
    assert rows["mezo_loop"]["tokens_per_second"] == pytest.approx(48 / rows["mezo_loop"]["seconds_median"])
    assert rows["mezo_loop"]["ratio_to_inference"] < 1


def test_memory_of_rows_that_write_is_compared_with_that_of_generate(folder, monkeypatch):
    fake_python(monkeypatch, folder, """case "$3" in *es_generate*) peak=12;; *generate*) peak=8;; *) peak=1;; esac
        echo "{\\"peak_bytes\\": $peak, \\"loaded_bytes\\": 5}\"""")  # fmt: skip
    rows = measured(monkeypatch, folder, "--rows", "es_generate", "--rows", "mezo_loop")
    assert [rows[name]["memory_ratio_to_generate"] for name in ("generate", "es_generate")] == [1, 1.5]
    assert rows["mezo_loop"]["memory_ratio_to_inference"] == 1


# ---------------------------------------------------------------- the command


def test_every_row_is_timed_and_its_numbers_agree(folder, monkeypatch, capsys):
    rows = measured(monkeypatch, folder, "--no-memory")
    assert tuple(rows) == ROWS
    inference = rows["inference"]["seconds"]
    for name, row in rows.items():
        assert (row["dtype"], row["members"], row["examples"], row["tokens"]) == ("float32", 6, 1, 8)
        assert len(row["seconds"]) == 2
        assert row["seconds_min"] <= row["seconds_median"] == statistics.median(row["seconds"]) <= row["seconds_max"]
        assert row["tokens_per_second"] == pytest.approx(48 / row["seconds_median"])
        evaluations = 6 if name in MEMBER_ROWS else 1
        assert row["evaluations_per_second"] == pytest.approx(evaluations / row["seconds_median"])
        paired = [i / s for i, s in zip(inference, row["seconds"], strict=True)]
        assert row["ratio_to_inference"] == pytest.approx(statistics.median(paired))
        assert (row["ratio_min"], row["ratio_max"]) == pytest.approx((min(paired), max(paired)))
        assert row["peak_memory_bytes"] is row["memory_ratio_to_inference"] is row["problem"] is None
        assert (row["device"], row["threads"]) == ("cpu", torch.get_num_threads())
        assert row["versions"]["torch"] == torch.__version__
    assert rows["inference"]["ratio_to_inference"] == 1
    assert rows["mezo_loop"]["ratio_to_inference"] < 1
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert all(name in shown for name in ROWS)


def test_cases_are_every_dtype_at_every_shape(folder, monkeypatch):
    file = folder.parent / "bench.json"
    arguments = ("--dtype", "float32", "--dtype", "bfloat16", "--members", "6", "--members", "8", "--tokens", "4")
    options = ("--repeats", "1", "--rows", "es_low_rank", "--no-memory", "--device", "cpu", "--json", str(file))
    assert exit_code(monkeypatch, str(folder), *arguments, *options) == 0
    found = [(r["dtype"], r["members"], r["tokens"], r["name"]) for r in json.loads(file.read_text())]
    rows = ("inference", "es_low_rank")
    assert found == [(d, m, 4, name) for d in ("float32", "bfloat16") for m in (6, 8) for name in rows]


def test_memory_is_that_of_a_process_with_the_model_and_its_optimizer_alone(tmp_path):
    """AdamW adds a gradient and two moments a weight; this process, which starts that one, is larger than either."""
    model = tiny_model(vocab_size=16384, hidden_size=256)
    size = 4 * sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path)
    ballast = torch.ones(1 << 28)
    memory = row_memory("backprop_adamw", plan_cases(str(tmp_path), ["float32"], [6], [1], [8], device="cpu")[0])
    assert memory.problem is None
    assert size < memory.loaded_bytes < memory.peak_bytes < 4 * ballast.numel()
    assert memory.peak_bytes - memory.loaded_bytes > 2.5 * size


def fake_python(monkeypatch, folder: Path, script: str) -> None:
    """Memory is measured by a shell script instead of a Python process."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_killed_memory_process_is_told_and_its_row_not_timed(folder, monkeypatch, capsys):
    fake_python(monkeypatch, folder, """case "$3" in *es_low_rank*) kill -9 $$;; esac
        case "$3" in *inference*) peak=8;; *) peak=12;; esac
        echo "{\\"peak_bytes\\": $peak, \\"loaded_bytes\\": 5}\"""")  # fmt: skip
    rows = measured(monkeypatch, folder, *FEW)
    assert (rows["es_low_rank"]["peak_memory_bytes"], rows["es_low_rank"]["problem"]) == (None, "out of memory")
    assert rows["es_low_rank"]["seconds_median"] is None
    assert (rows["mezo_loop"]["peak_memory_bytes"], rows["mezo_loop"]["loaded_memory_bytes"]) == (12, 5)
    assert [rows[name]["memory_ratio_to_inference"] for name in ("inference", "mezo_loop")] == [1, 1.5]
    assert rows["mezo_loop"]["seconds_median"] > 0
    assert "es_low_rank: out of memory" in capsys.readouterr().out


def test_a_failed_memory_process_costs_only_the_memory(folder, monkeypatch, capsys):
    fake_python(monkeypatch, folder, "echo 'no such thing' >&2; exit 3")
    rows = measured(monkeypatch, folder, "--rows", "mezo_loop")
    assert rows["mezo_loop"]["peak_memory_bytes"] is None
    assert rows["mezo_loop"]["seconds_median"] > 0
    assert "mezo_loop: no memory: its process ended with status 3: no such thing" in capsys.readouterr().out


@pytest.mark.parametrize("at_step", [0, 2])
def test_a_row_without_memory_does_not_end_the_others(at_step, folder, monkeypatch, capsys):
    build, taken = bench_rows.build_step, []

    def failing(row, case, model):
        step = build(row, case, model)

        def lacking():
            taken.append(row)
            if len(taken) > at_step:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore words")
            return step()

        return lacking if row == "es_low_rank" else step

    monkeypatch.setattr(bench, "build_step", failing)
    rows = measured(monkeypatch, folder, *FEW, "--no-memory")
    assert (rows["es_low_rank"]["problem"], rows["es_low_rank"]["seconds"]) == ("out of memory", [])
    assert rows["es_low_rank"]["ratio_to_inference"] is None
    assert len(taken) == at_step + 1
    assert rows["mezo_loop"]["ratio_to_inference"] > 0
    assert "es_low_rank: out of memory" in capsys.readouterr().out


def test_an_interrupted_measurement_stops_its_process_and_keeps_earlier_cases(folder, monkeypatch, capsys):
    """The second case's process sleeps; only this process gets the signal."""
    file, number = folder.parent / "bench.json", folder.parent / "number"
    fake_python(monkeypatch, folder, f"""case "$3" in *'"tokens": 8'*) echo $$ > {number}; exec sleep 60;; esac
        echo '{{"peak_bytes": 7, "loaded_bytes": 5}}'""")  # fmt: skip

    def interrupt():
        while not number.exists() or not number.read_text().strip():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    arguments = ("--members", "6", "--tokens", "4", "--tokens", "8", "--repeats", "1", "--device", "cpu")
    assert exit_code(monkeypatch, str(folder), *arguments, "--rows", "inference", "--json", str(file)) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)
    assert [(row["name"], row["tokens"]) for row in json.loads(file.read_text())] == [("inference", 4)]
    assert "Traceback" not in capsys.readouterr().err


def test_without_peft_its_row_is_left_out_and_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names, notes = plan_rows(["lora", "mezo_loop"])
    assert names == ["inference", "mezo_loop"]
    assert notes == ["lora is left out: the library peft is not installed (pip install 'hybrid-opt[peft]')"]


def test_lists_of_one_serve_all_shapes():
    cases = plan_cases("m", ["bfloat16"], [6, 8], [1, 2], [32], new_tokens=[4, 5])
    assert [(c.members, c.examples, c.tokens, c.new_tokens) for c in cases] == [(6, 1, 32, 4), (8, 2, 32, 5)]
    assert cases[0] == replace(cases[1], members=6, examples=1, new_tokens=4)


REFUSED = {
    "odd members": (["--members", "7"], "--members 7", "pairs", "even number", "such as 8"),
    "few members": (["--members", "4"], "--members 4", "even number from 6 on", "such as 6"),
    "no examples": (["--batch", "0"], "--batch 0", "write 1 or more"),
    "one token": (["--tokens", "1"], "--tokens 1", "write 2 or more"),
    "no new tokens": (["--new-tokens", "0"], "--new-tokens 0", "write 1 or more"),
    "no repeats": (["--repeats", "0"], "--repeats 0", "write 1 or more"),
    "no members a forward": (["--members-per-forward", "0"], "--members-per-forward 0", "write 1 or more"),
    "other lengths": (["--members", "6", "--members", "8", *["--tokens", "8"] * 3], "--members is given 2 times", "3"),
    "unknown row": (["--rows", "mezo"], "--rows 'mezo'", "es_dense", "did you mean 'mezo_loop'?"),
    "unknown dtype": (["--dtype", "bf16"], "--dtype 'bf16'", "did you mean 'bfloat16'?"),
    "unknown device": (["--device", "gpu"], "--device 'gpu'", "auto, cpu, cuda"),
    "unknown masters": (["--master-weights", "bfloat16"], "--master-weights 'bfloat16'", "write one of", "none"),
    "one rank": (["--distributed", "--ranks", "1"], "--ranks 1", "write 2 or more"),
    "rows of the other table": (["--distributed", "--rows", "lora"], "--rows", "without --distributed"),
    "no folder": (["--json", "nowhere/bench.json"], "--json nowhere/bench.json", "no folder"),
    "a folder": (["--json", "model"], "--json model", "is a folder"),
    "too many tokens": (["--tokens", "33"], "--tokens 33:", "32 positions", "write 32 or fewer"),
    "too many to write": (
        ["--tokens", "24", "--new-tokens", "9", "--rows", "es_generate"],
        *("--tokens 24 and --new-tokens 9:", "32 positions", "write 32 or fewer together"),
    ),
}


@pytest.mark.parametrize(("arguments", "fragments"), [(c[0], c[1:]) for c in REFUSED.values()], ids=list(REFUSED))
def test_is_refused_in_a_line(arguments, fragments, tmp_path, monkeypatch, capsys):
    tiny_model("gpt2").config.save_pretrained(tmp_path / "model")  # without weights: nothing may need them yet
    monkeypatch.chdir(tmp_path)
    assert exit_code(monkeypatch, "model", *arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: command line: "), message
    assert message.count("\n") == 1, message
    assert [fragment for fragment in fragments if fragment not in message] == [], message


def test_an_unknown_model_is_refused_in_a_line(monkeypatch, capsys):
    assert exit_code(monkeypatch, "smollm2-135") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: command line: MODEL: 'smollm2-135' cannot be loaded"), message
    assert "did you mean 'smollm2-135m'?" in message
    assert message.count("\n") == 1, message


def test_distributed_compares_two_ranks_with_one(folder, monkeypatch, capsys):
    rows = folder.parent / "bench.json"
    assert exit_code(monkeypatch, str(folder), *SMALL, "--distributed", "--no-memory", "--json", str(rows)) == 0
    one, two = json.loads(rows.read_text())
    assert (one["ranks"], two["ranks"]) == (1, 2)
    ratios = [alone / (2 * together) for alone, together in zip(one["seconds"], two["seconds"], strict=True)]
    assert two["efficiency"] == pytest.approx(statistics.median(ratios))
    assert "efficiency" in capsys.readouterr().out


def test_an_es_stretch_starts_after_a_backprop_step(case):
    """In a process of its own, because torch.distributed can be started but once."""
    kept, moved = (row_memory(name, case) for name in ("es_stretch", "es_stretch_moved"))
    assert kept.problem is moved.problem is None
    # The steps before the measurement have used the same memory, so the peak may be what was there already.
    assert kept.peak_bytes >= kept.loaded_bytes > 0
    assert moved.peak_bytes >= moved.loaded_bytes > 0
    schedule = load_schedule(build_schedule("es_stretch", case)).schedule
    assert [list(plan_of(schedule, step)) for step in range(4)] == [["it"], ["es"], ["es"], ["es"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(folder, monkeypatch, capsys):
    assert exit_code(monkeypatch, str(folder), "--device", "cuda") == 2
    assert "--device cuda: torch finds no CUDA device" in capsys.readouterr().err
