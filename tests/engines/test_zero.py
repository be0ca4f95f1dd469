"""ZeRO on real processes against the local engine; `zero_scenarios.py` has what they do."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from tests.launching import launch

pytest.importorskip("deepspeed")

STAGES = ("1", "2", "3")

# Ranks and DeepSpeed's flat buffers add in another order than torch does, which changes a gradient's or a norm's last bits
# (1e-7 of it). An ES step makes more of it: a loss that is 5e-7 off, divided by sigma = 0.02, times the learning rate 0.05 and a
# noise value of up to 4, moves a weight by 5e-6. What a run moves altogether is a thousand times as much.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a scenario returned on so many ranks: results(world_size, name); all of them run at the first question."""
    folder, known = tmp_path_factory.getbasetemp(), {}
    shared = folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder

    def of(world_size: int, name: str):
        if world_size not in known:
            known[world_size] = launched_once(world_size, shared / f"zero-{world_size}")
        outcome = known[world_size]
        if "failed" in outcome:
            pytest.fail(f"the launch of {world_size} ranks failed:\n{outcome['failed']}", pytrace=False)
        if "error" in outcome[name]:
            pytest.fail(f"on {world_size} ranks, {name}:\n{outcome[name]['error']}", pytrace=False)
        return outcome[name]["result"]

    return of


def launched_once(world_size: int, folder: Path) -> dict:
    """The results of a launch, which several pytest workers share."""
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = (folder / "results.json").exists()
        if not done and (problem := launch(world_size, folder, "tests.engines.zero_scenarios", folder)):
            (folder / "results.json").write_text(json.dumps({"failed": problem}))
        return json.loads((folder / "results.json").read_text())


def largest(found: dict, what: str) -> float:
    return max(found[stage][what] for stage in STAGES)


one_and_two = pytest.mark.parametrize("ranks", [1, 2])
every_size = pytest.mark.parametrize("ranks", [1, 2, 4])


# ------------------------------------------------------------ the same as one process


@one_and_two
@pytest.mark.parametrize(
    "name",
    [
        "es_low_rank",
        "es_dense",
        "es_in_bfloat16",
        "es_on_a_reward",
        "es_in_a_lazy_subspace",
        "es_under_a_mask",
        "es_with_relative_sigma",
    ],
)
def test_es_gives_the_local_engines_losses_and_weights_bitwise(results, ranks, name):
    # Every forward pass has the same two members wherever it runs, and every rank adds the same noise in the same order.
    found = results(ranks, name)
    assert [found[stage] for stage in STAGES] == [{"losses": 0.0, "weights": 0.0}] * 3
    assert found["moved"] > 0.1


@one_and_two
@pytest.mark.parametrize(
    "name",
    [
        "backprop_by_adamw",
        "backprop_by_sgd",
        "alternate_with_adamw",
        "alternate_with_sgd",
        "blend_with_adamw",
        "blend_with_sgd",
        "es_under_the_mask_of_a_gradient",
    ],
)
def test_schedules_with_backprop_are_the_local_engines_but_for_rounding(results, ranks, name):
    found = results(ranks, name)
    assert largest(found, "losses") < ROUNDING
    assert largest(found, "weights") < ROUNDING
    assert found["moved"] > 200 * ROUNDING


def test_a_reward_and_a_loss_with_a_pull_to_the_first_weights_are_the_local_engines(results):
    found = results(2, "es_on_a_reward_and_backprop_on_a_loss")
    assert largest(found, "losses") < ROUNDING
    assert largest(found, "weights") < ROUNDING
    assert found["moved"] > 200 * ROUNDING


@one_and_two
def test_stages_1_and_2_give_the_same_bits(results, ranks):
    for name in ("alternate_with_adamw", "blend_with_sgd", "backprop_by_adamw"):
        found = results(ranks, name)
        assert found["1"] == found["2"]


@pytest.mark.parametrize("name", ["turns", "turns, offloaded", "blend"])
def test_each_ranks_part_of_a_stale_gradient_is_that_of_the_whole(results, name):
    found = results(2, "stale_gradients")[name]
    assert largest(found, "losses") < ROUNDING
    assert largest(found, "weights") < ROUNDING
    assert found["moved"] > 200 * ROUNDING


@pytest.mark.parametrize("name", ["orthogonal", "sphere", "align", "fzoo"])
def test_directions_that_know_each_other_are_those_of_one_process(results, name):
    found = results(2, "directions_that_know_each_other")[name]
    assert largest(found, "losses") < ROUNDING
    assert largest(found, "weights") < ROUNDING
    assert found["moved"] > 500 * ROUNDING


@pytest.mark.parametrize("name", ["sketched gradients", "moment", "estimates"])
def test_guides_are_the_same_however_weights_are_spread(results, name):
    found = results(2, "guided")[name]
    assert largest(found, "losses") < ROUNDING
    assert largest(found, "weights") < ROUNDING
    assert found["moved"] > 200 * ROUNDING


# ------------------------------------------------------------ narrow weights


@pytest.mark.parametrize(("kind", "rounding"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_narrow_runs_stay_within_their_own_rounding_of_the_float32_run(results, kind, rounding):
    # A loss of 4.2 computed in this dtype is off by its rounding. In an ES step that error is divided by sigma (0.02) and
    # comes back times the learning rate (0.05) and a noise value of up to 4.
    loss = 4.2 * rounding
    for name, found in results(2, "narrow_runs_stay_near_float32").items():
        if kind in name:
            assert found["losses"] < loss, name
            assert found["weights"] < loss / 0.02 * 0.05 * 4, name


@one_and_two
def test_every_forward_copy_is_its_rounded_master_after_every_kind_of_step(results, ranks):
    found = results(ranks, "masters_and_forward_copies")
    assert len(found) == 12
    assert all(disagreement == [0.0, 0.0] for disagreement in found.values()), found


def test_a_step_that_overflows_is_skipped_and_training_goes_on(results):
    for name, found in results(2, "overflowing_steps").items():
        skipped = [after < before for before, after in zip([2.0**19, *found["scales"]], found["scales"], strict=False)]
        assert skipped[0], name
        assert found["moved"][1:] == [not skip for skip in skipped[1:]], name
        assert not any(skipped[-3:]), name
        assert found["losses"][-1] < found["losses"][0], name
        assert found["disagree"] == 0.0, name


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_overflowed_is_not_applied_again(results, stage):
    found = results(2, "gradients_that_overflow_are_not_stale")[stage]
    assert found["finite"]
    taken = [after == before for before, after in zip([2.0**19, *found["scales"]], found["scales"], strict=False)][::2]
    assert (taken[0], taken[-1]) == (False, True)
    assert found["moved"][2::2] == taken[1:]
    assert found["moved"][1::2] == [any(taken[: turn + 1]) for turn in range(len(taken))]


@pytest.mark.parametrize("kind", ["float32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_es_update_survives_an_optimizer_step_without_gradient(results, kind, stage):
    found = results(2, "updates_before_a_step_without_gradient")[f"{kind} {stage}"]
    assert found["moved"] > 0.05
    assert found["masters"] == 0.0
    assert found["forward copies"] == 0.0


# ------------------------------------------------------------ whole copies under ZeRO-3


@pytest.mark.parametrize("threshold", ["0", "None", "1000000000"])
def test_a_forward_pass_right_after_a_step_sees_the_new_weights_whatever_is_kept_whole(results, threshold):
    found = results(2, "forward_passes_right_after_a_step")
    for policy in ("one policy", "by groups"):
        assert found[f"{threshold} {policy}"] == [0.0] * 4


# ------------------------------------------------------------ offloading


def test_offloaded_runs_are_those_on_the_device(results):
    found = results(2, "offloaded")
    assert len(found) == 5
    for name, differs in found.items():  # clipped, and the norm is added up in another order
        assert max(differs.values()) < ROUNDING, name


# ------------------------------------------------------------ how a batch is cut


@one_and_two
@pytest.mark.parametrize(
    "name",
    [
        "accumulation 2",
        "micro-batches of 1",
        "3 examples",
        "3 examples, accumulation 2",
        "1 example",
    ],
)
def test_the_gradient_is_that_of_the_whole_batch_however_it_is_cut(results, ranks, name):
    found = results(ranks, "batches_cut_in_parts")[name]
    assert largest(found, "losses") < ROUNDING
    assert largest(found, "weights") < ROUNDING
    assert found["moved"] > 100 * ROUNDING


def test_accumulated_and_offloaded_gradients_are_those_of_the_whole_batch(results):
    found = results(2, "offloaded_batches_cut_in_parts")
    assert largest(found, "losses") < ROUNDING
    assert largest(found, "weights") < ROUNDING


# ------------------------------------------------------------ phases that own different parameters


@one_and_two
@pytest.mark.parametrize("where", ["plain", "offloaded"])
def test_phases_that_own_different_parameters_clip_only_those(results, ranks, where):
    found = results(ranks, "owners_change")[where]
    assert largest(found, "losses") < ROUNDING
    assert largest(found, "weights") < ROUNDING
    assert found["moved"] > 200 * ROUNDING


def test_adamw_counts_the_steps_of_each_group_by_itself(results):
    # One step too many or too few in the bias correction would move weights by another tenth of the learning rate, 1e-3.
    found = results(2, "owners_change_under_adamw")
    assert largest(found, "weights") < ROUNDING


def test_a_group_at_rest_keeps_its_weights_and_moments(results):
    found = results(2, "groups_at_rest")
    assert len(found) == 6
    for name, group in found.items():
        assert group["trained"], name
        assert group["moments"] > 0, name
        assert group["weights rest"], name
        assert group["moments rest"], name


@pytest.mark.parametrize("masters", ["fp32", "none", "stochastic_rounding"])
@pytest.mark.parametrize("stage", STAGES)
def test_parameters_of_es_alone_have_no_optimizer_state(results, stage, masters):
    found = results(2, "memory_of_es_parameters")[f"{stage} {masters}"]
    assert found["state"] == 2 * found["owned"]  # AdamW's two moments, over all ranks
    assert found["finite"]


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_of_es_alone_have_float32_masters_only_if_wanted(results, stage):
    found = results(2, "memory_of_es_parameters")
    kept = found[f"{stage} fp32"]
    copies = 1 if stage == "3" else 2  # whole on both ranks, but at stage 3
    assert (kept["masters"], kept["dtypes"]) == (copies * kept["es only"], ["torch.float32"])
    for masters in ("none", "stochastic_rounding"):
        without = found[f"{stage} {masters}"]
        assert (without["masters"], without["dtypes"]) == (0, ["torch.bfloat16"])


# ------------------------------------------------------------ alternating


@pytest.mark.parametrize("stage", STAGES)
def test_es_steps_leave_the_optimizers_moments_alone(results, stage):
    found = results(2, "moments_over_es_steps")[stage]
    assert found["values"] > 0
    assert found["over es steps"]
    assert not found["over a backprop step"]


@pytest.mark.parametrize("name", ["decay", "reset", "reset, put away", "decay, offloaded"])
def test_estimators_that_take_turns_are_coupled_as_locally(results, name):
    found = results(2, "coupled_turns")[name]
    assert found["by coupling"] > 200 * ROUNDING
    for stage in STAGES:
        differs = found[stage]
        assert max(differs["losses"], differs["weights"], differs["moments"]) < ROUNDING, differs
        assert differs["latest"] < 1e-4
        assert not differs["stale"]


# ------------------------------------------------------------ what crosses ranks


@pytest.mark.parametrize("name", ["es", "dense es", "es beside backprop"])
def test_an_es_step_sends_no_more_than_16_bytes_a_member(results, name):
    found = results(2, "traffic_of_es_steps")
    members = 4
    assert found[f"{name} 1"]["sent"] <= 16 * members
    assert found[f"{name} 2"]["sent"] <= 16 * members
    assert found[f"{name} 3"]["through ranks"] <= 16 * members  # the rest is the weights' own traffic


@pytest.mark.parametrize("stage", STAGES)
def test_a_backprop_steps_traffic_is_seen_by_the_same_count(results, stage):
    found = results(2, "traffic_of_es_steps")
    assert found[f"backprop {stage}"]["sent"] >= 4 * found["values"]  # its float32 gradient


# ------------------------------------------------------------ populations over ranks


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["population 8", "population 6", "distinct examples", "dense", "not antithetic"])
def test_the_estimate_does_not_depend_on_the_number_of_ranks(results, name, stage):
    alone = results(1, "estimates")[f"{name} {stage}"]
    assert len(set(alone)) == len(alone) > 2
    assert results(2, "estimates")[f"{name} {stage}"] == alone
    assert results(4, "estimates")[f"{name} {stage}"] == alone


# ------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "name",
    [
        "es with momentum",
        "adam es beside backprop, norms frozen",
        "bf16 alternate with momentum",
        "coupled",
        "stale gradients",
        "masks of gradients",
        "bf16 by groups",
    ],
)
def test_going_on_from_a_checkpoint_is_going_on(results, stage, name):
    assert results(2, "resumed")[f"{name} {stage}"] == {"losses": 0.0, "weights": 0.0}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["es", "after backprop"])
def test_recorded_steps_are_taken_again_bitwise(results, stage, name):
    assert results(2, "taken_again_from_records")[f"{name} {stage}"] == 0.0


@pytest.mark.parametrize("stage", [2, 3])
def test_rounding_at_random_goes_on_alike_after_a_checkpoint(results, stage):
    found = results(2, "resumed")[f"bf16 by groups, rounded at random {stage}"]
    assert found == {"losses": 0.0, "weights": 0.0}


@pytest.mark.parametrize("stage", STAGES)
def test_a_diverged_step_is_rolled_back_as_locally_and_all_ranks_see_what_one_has_lost(results, stage):
    found = results(2, "diverging")
    assert max(found[f"back to step 0 {stage}"], found[f"back to step 1 {stage}"]) < ROUNDING
    lost = "DivergedError: step 1: after the update parameter lm_head.weight has values that are not finite"
    assert found[f"lost {stage}"].startswith(lost)
    drifted = "DriftError: step 1: parameter lm_head.weight has changed since step 0 while nobody"
    assert found[f"drifted {stage}"].startswith(drifted)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("where", ["on the device", "offloaded"])
def test_groups_that_never_acted_before_the_checkpoint_start_afresh(results, stage, where):
    found = results(2, "resumed_with_groups_that_never_acted")[f"{stage} {where}"]
    assert found == {"losses": 0.0, "weights": 0.0}


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_before_the_first_backprop_step_can_be_resumed(results, stage):
    assert results(2, "resumed_before_backprop_acted")[stage] == {"losses": 0.0, "weights": 0.0}


@every_size
def test_frozen_and_uneven_parameters_can_be_resumed(results, ranks):
    found = results(ranks, "resumed_with_frozen_and_uneven_parameters")
    assert list(found.values()) == [{"losses": 0.0, "weights": 0.0}] * 3


# ------------------------------------------------------------ the model on disk


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_with_tied_embeddings_is_saved_as_it_was_trained(results, stage):
    found = results(2, "saved_with_tied_embeddings")[stage]
    assert found["moved"] > 0.05
    assert found["tied"]
    assert found["logits"] == 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_are_saved_alone_and_merged(results, stage):
    found = results(2, "saved_with_adapters")[stage]
    assert found["moved"] > 0.01
    assert found["adapter"] == 0.0
    assert found["merged"] < 1e-5  # W x + B A x against (W + B A) x, logits of about 1


def test_adapters_train_as_under_the_local_engine(results):
    found = results(2, "adapters_like_local")
    assert largest(found, "losses") < ROUNDING
    assert largest(found, "weights") < ROUNDING
    assert found["moved"] > 50 * ROUNDING


# ------------------------------------------------------------ ranks that differ


@pytest.mark.parametrize("stage", STAGES)
def test_a_weight_that_differs_on_one_rank_is_named_on_all(results, stage):
    found = results(2, "ranks_that_differ")[stage]
    assert found["all ranks were told"], found["said"]


def test_ranks_are_compared_every_so_many_steps(results):
    quiet, said = results(2, "ranks_that_differ_while_training")
    assert quiet == ""
    assert said.startswith("step 3: parameter lm_head.weight of rank 1")


# ------------------------------------------------------------ idle optimizer state


@pytest.mark.parametrize("stage", STAGES)
def test_putting_idle_optimizer_state_away_changes_nothing(results, stage):
    found = results(2, "optimizer_state_put_away")[stage]
    assert found["away"] == [False, False, True, False, False]
    assert (found["losses"], found["weights"]) == (0.0, 0.0)
    assert found["saved while away"] == {"losses": 0.0, "weights": 0.0}


def test_offloaded_optimizer_state_is_not_put_away_again(results):
    found = results(2, "offloaded_state_put_away")
    assert len(found) == 6
    assert all(max(differs.values()) < ROUNDING for differs in found.values()), found


# ------------------------------------------------------------ what backprop leaves behind


@pytest.mark.parametrize("idle", [None, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_and_first_moments_are_whole_on_every_rank(results, stage, idle):
    found = results(2, "gradients_and_moments_are_whole")
    assert found["gradients"] == found["moments"] == 4
    differs = found[f"{stage} {idle}"]
    assert differs["shards"] == 0.0
    assert max(differs["gradient"], differs["moments"], differs["norms"]) < ROUNDING, differs


# ------------------------------------------------------------ sizes that do not go up evenly


@every_size
@pytest.mark.parametrize("name", ["es", "backprop", "turns", "blend", "by groups"])
def test_odd_sizes_and_parameters_smaller_than_the_number_of_ranks_train_as_locally(results, ranks, name):
    found = results(ranks, "uneven_sizes")[name]
    assert largest(found, "losses") < ROUNDING
    assert largest(found, "weights") < ROUNDING
    assert found["moved"] > 1000 * ROUNDING


@every_size
def test_frozen_parameters_stay_beside_those_that_are_trained(results, ranks):
    for found in results(ranks, "frozen_parameters").values():
        assert found["frozen"] == 0.0
        assert found["scale"] > 1e-3


def test_layers_change_hands_by_their_sensitivity(results):
    found = results(2, "layers_by_sensitivity")
    local, *others = found["chosen"]
    assert len(others) == 3
    assert all(chosen == local for chosen in others)
    assert local[0] == local[1] != local[2]
    assert largest(found, "losses") < ROUNDING
    assert largest(found, "weights") < ROUNDING
    assert found["moved"] > 1000 * ROUNDING
    assert "policy.0.layers.by: gradient_norm needs gradients outside of a step" in found["refused"]


def test_examples_are_dealt_out_by_their_length(results):
    found = results(2, "by_length")
    assert largest(found, "losses") < ROUNDING
    assert largest(found, "weights") < ROUNDING
    assert found["moved"] > 1000 * ROUNDING


def test_a_phase_may_leave_backprop_nothing(results):
    found = results(2, "nothing_owned_by_backprop")
    assert largest(found, "losses") < ROUNDING
    assert largest(found, "weights") < ROUNDING
    assert found["moved"] > 1000 * ROUNDING
