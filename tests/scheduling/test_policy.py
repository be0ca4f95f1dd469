"""Rules against parameter names."""

import pytest

from hybrid_opt.config import load_schedule
from hybrid_opt.config.schedule import Rule
from hybrid_opt.errors import UserError
from hybrid_opt.scheduling.policy import Policy, layer_number, resolve, resolve_policies
from tests.conftest import tiny_model

LLAMA = [name for name, _ in tiny_model("llama", num_hidden_layers=12).named_parameters()]
GPT2 = [name for name, _ in tiny_model("gpt2", n_layer=3).named_parameters()]
ESTIMATORS = ("es", "bp")


def rules(*items: dict) -> list[Rule]:
    return [Rule(**item) for item in items]


def owners(*items: dict, names=LLAMA) -> dict[str, tuple[str, ...]]:
    return resolve(rules(*items), names, ESTIMATORS, "policy").owners


def refused(*items: dict, names=LLAMA) -> str:
    with pytest.raises(UserError) as error:
        owners(*items, names=names)
    return str(error.value)


def config(policy=None, **schedule):
    estimators = {
        "es": {"type": "es", "learning_rate": 1},
        "es2": {"type": "es", "learning_rate": 1},
        "bp": {"type": "backprop", "learning_rate": 1},
    }
    return load_schedule(
        {"estimators": estimators, "schedule": schedule, **({"policy": policy} if policy is not None else {})}
    )


def test_without_rules_every_estimator_may_move_everything():
    assert resolve(None, LLAMA, ESTIMATORS, "policy").owners == dict.fromkeys(LLAMA, ESTIMATORS)


def test_the_first_rule_that_matches_wins():
    found = owners(
        {"match": r"norm\.weight$", "use": "frozen"},
        {"match": r"layers\.(0|1)\.", "use": ["bp"]},
        {"match": r"self_attn", "use": ["es", "bp"]},
        {"match": ".*", "use": ["es"]},
    )
    for name in LLAMA:
        if name.endswith("norm.weight"):
            expected = ()
        elif name.startswith(("model.layers.0.", "model.layers.1.")):
            expected = ("bp",)
        elif "self_attn" in name:
            expected = ("es", "bp")
        else:
            expected = ("es",)
        assert found[name] == expected, name
    assert list(found) == LLAMA


def test_names_are_in_the_models_order_whatever_the_rules_order():
    policy = resolve(
        rules({"match": "lm_head|layers.11", "use": ["es"]}, {"match": ".*", "use": ["bp", "es"]}),
        LLAMA,
        ESTIMATORS,
        "policy",
    )
    assert policy.names("es") == LLAMA
    assert policy.names("bp") == [name for name in LLAMA if name != "lm_head.weight" and ".11." not in name]
    assert Policy({"a": (), "b": ("es",)}).names("es") == ["b"]


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("7", {7}),
        ("0", {0}),
        ("2-4", {2, 3, 4}),
        ("10-99", {10, 11}),
        ("first-2", {0, 1}),
        ("last-2", {10, 11}),
        ("last-99", set(range(12))),
        (1, {1}),
    ],
)
def test_layers(layers, numbers):
    found = owners({"layers": layers, "use": ["bp"]}, {"match": ".*", "use": "frozen"})
    chosen = {name for name, use in found.items() if use}
    assert chosen == {name for name in LLAMA if name.startswith(tuple(f"model.layers.{n}." for n in numbers))}
    assert len(chosen) == 9 * len(numbers)


def test_layers_of_gpt2():
    found = owners({"layers": "last-1", "use": ["bp"]}, {"match": ".*", "use": "frozen"}, names=GPT2)
    assert {name for name, use in found.items() if use} == {name for name in GPT2 if ".h.2." in name}


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.7.mlp.weight", 7),
        ("0.weight", 0),
        ("model.layers.3.experts.12.w1", 3),
        ("base_model.model.model.layers.10.q_proj.lora_A.default.weight", 10),
        ("fc1.weight", None),
        ("block.12", None),
        ("lm_head.weight", None),
    ],
)
def test_layer_number(name, number):
    assert layer_number(name) == number


# ---------------------------------------------------------------- strict and total


def test_a_rule_that_selects_nothing_is_refused_with_the_nearest_names():
    message = refused({"match": r"mlp\.up_prj", "use": ["es"]}, {"match": ".*", "use": "frozen"})
    assert message.startswith(r"policy.0: match 'mlp\\.up_prj' selects no parameter; nearest names: model.layers.")
    assert ".mlp.up_proj.weight" in message


def test_a_rule_hidden_by_earlier_ones_is_refused():
    message = refused({"match": ".*", "use": ["es"]}, {"match": r"norm\.weight", "use": "frozen"})
    norms = [name for name in LLAMA if name.endswith("norm.weight")]
    assert message == (
        r"policy.1: match 'norm\\.weight' selects only parameters that earlier rules have taken: "
        f"{', '.join(norms[:4])}, and {len(norms) - 4} more; move it up or drop it"
    )


def test_a_parameter_without_a_rule_is_refused():
    assert refused({"layers": "first-99", "use": ["es"]}) == (
        f"policy: 3 of {len(LLAMA)} parameters are covered by no rule: model.embed_tokens.weight, model.norm.weight, "
        "lm_head.weight; add a last rule such as {match: '.*', use: frozen}"
    )


@pytest.mark.parametrize(
    ("layers", "names", "has"),
    [
        ("12", LLAMA, "the model has layers 0 to 11"),
        ("last-1", ["weight", "bias"], "the model has no numbered layers"),
    ],
)
def test_layers_that_are_not_there(layers, names, has):
    message = refused({"layers": layers, "use": ["es"]}, {"match": ".*", "use": "frozen"}, names=names)
    assert message == f"policy.0: layers {layers} selects no parameter; {has}"


# ---------------------------------------------------------------- policies of phases


ALL = [{"match": ".*", "use": ["es", "bp"]}]
HEAD = [{"match": "lm_head", "use": ["bp"]}, {"match": ".*", "use": ["es"]}]


def test_one_policy_for_a_schedule_without_phases():
    (item,) = resolve_policies(config(HEAD, type="blend", weights={"es": 1, "bp": 1}), LLAMA).items()
    assert item == (None, resolve(rules(*HEAD), LLAMA, ESTIMATORS, "policy"))


def test_a_phases_policy_replaces_the_files():
    single = {"type": "single", "estimator": "es"}
    phases = [{"steps": 1, "schedule": single}, {"steps": 1, "schedule": single, "policy": ALL}, {"schedule": single}]
    for policy in (HEAD, None):
        found = resolve_policies(config(policy, type="phases", phases=phases), LLAMA)
        default = (
            resolve(rules(*HEAD), LLAMA, ESTIMATORS, "policy")
            if policy
            else Policy(dict.fromkeys(LLAMA, ("es", "es2", "bp")))
        )
        assert found == {0: default, 1: Policy(dict.fromkeys(LLAMA, ("es", "bp"))), 2: default}


def test_errors_in_a_phases_policy_name_the_phase():
    single = {"type": "single", "estimator": "es"}
    phases = [{"steps": 1, "schedule": single}, {"schedule": single, "policy": [{"match": "nothing", "use": ["es"]}]}]
    with pytest.raises(UserError, match=r"^schedule\.phases\.1\.policy\.0: match 'nothing' selects no parameter"):
        resolve_policies(config(type="phases", phases=phases), LLAMA)


def test_an_estimator_that_acts_must_own_something():
    head = [{"match": "lm_head", "use": ["bp"]}, {"match": ".*", "use": ["es2"]}]
    with pytest.raises(UserError, match=r"^policy: 'es' acts, but no rule lets it move any parameter "):
        resolve_policies(config(head, type="alternate", pattern={"bp": 1, "es": 1}), LLAMA)
    assert resolve_policies(config(head, type="alternate", pattern={"bp": 1, "es2": 1}), LLAMA)[None].names("es") == []
    phases = [
        {"steps": 1, "schedule": {"type": "single", "estimator": "es"}, "policy": ALL},
        {"schedule": {"type": "single", "estimator": "es"}},
    ]
    with pytest.raises(UserError, match=r"^policy: 'es' acts in phase 1, but no rule"):
        resolve_policies(config(head, type="phases", phases=phases), LLAMA)
