"""Rewards from prompts to losses: what functions are handed, how examples are encoded, what ES makes of it."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_opt.config.data import Data
from hybrid_opt.config.probing import EvolutionStrategy
from hybrid_opt.config.rewards import Generation
from hybrid_opt.engines.local import LocalEngine
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.es import EsEstimator
from hybrid_opt.noise.keys import Key
from hybrid_opt.objectives.contract import select
from hybrid_opt.objectives.judging import Judge
from hybrid_opt.objectives.reward import RewardData, RewardObjective
from hybrid_opt.rollouts.prefill import Prefill
from tests.conftest import GLASS

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
ROWS = Dataset.from_list(
    [
        {"start": "It is", "wanted": "a", "numbers": [1, 2]},
        {"start": "Alice was", "wanted": "the", "numbers": [3]},
        {"start": "The Queen", "wanted": "said", "numbers": []},
    ]
)
PROMPT = Data(train="x", prompt="{start}", max_tokens=32)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(GLASS).eval()


def tokenizer(template=None):
    tokenizer = AutoTokenizer.from_pretrained(GLASS)
    tokenizer.chat_template = template
    return tokenizer


def letters(completions, **kwargs):
    return [float(c.count("e")) for c in completions]


class Recorded:
    """A reward function that keeps what it was handed."""

    def __init__(self, function=letters):
        self.function, self.calls = function, []

    def __call__(self, prompts, completions, **columns):
        self.calls.append({"prompts": prompts, "completions": completions, **columns})
        return self.function(completions)


def build(function, data=PROMPT, template=None, on_error="worst", rows=ROWS, **generation):
    generation = Generation(**{"max_new_tokens": 8, **generation})
    objective = RewardObjective([function], tokenizer(template), generation, on_error=on_error)
    examples = RewardData(data, objective)
    return objective, examples, examples.collate(examples.encode(rows))


def test_losses_are_negative_rewards_of_what_is_written(model):
    recorded = Recorded()
    objective, _, batch = build(recorded, stop=["."])
    losses = objective.losses(model, batch)
    (call,) = recorded.calls
    assert call["prompts"] == ROWS["start"][:]
    assert call["wanted"] == ["a", "the", "said"]
    assert call["numbers"] == [[1, 2], [3], []]
    assert call["start"] == call["prompts"]
    tok = tokenizer()
    for row, text in enumerate(call["completions"]):
        ids = tok(ROWS["start"][row], return_tensors="pt")
        whole = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.input_ids.shape[1] :]
        assert text == tok.decode(whole, skip_special_tokens=True).partition(".")[0]
        assert losses[row].item() == -text.count("e")


def test_measures(model):
    objective, _, batch = build(letters, stop=["the"], max_new_tokens=4)
    measures = objective.measures(model, batch)
    assert set(measures) == {"loss", "reward", "finished"}
    assert torch.equal(measures["reward"], -measures["loss"])
    judges = [Judge("one", letters, 2.0), Judge("two", lambda completions: [1.0, None, 1.0])]
    measures = RewardObjective(judges, tokenizer(), Generation(max_new_tokens=8)).measures(model, batch)
    assert measures["two"].tolist() == [1.0, 0.0, 1.0]
    expected = 2 * measures["one"] + torch.tensor([1.0, 0.0, 1.0])
    assert torch.allclose(measures["reward"], expected.to(measures["reward"].dtype))


def test_a_part_of_the_batch_is_judged_with_its_own_columns(model):
    recorded = Recorded()
    objective, _, batch = build(recorded)
    objective.losses(model, select(batch, torch.tensor([2, 0, 2])))
    assert recorded.calls[0]["wanted"] == ["said", "a", "said"]
    assert recorded.calls[0]["numbers"] == [[], [1, 2], []]


def test_missing_rewards_are_nan_for_the_estimator_and_the_worst_in_a_measure(model):
    def half(completions, **kwargs):
        return [math.nan if i == 1 else 1.0 - i for i in range(len(completions))]

    objective, _, batch = build(half)
    with pytest.warns(RuntimeWarning, match="returned nan"):
        losses = objective.losses(model, batch)
    assert losses[0] == -1
    assert losses[1].isnan()
    assert objective.measures(model, batch)["reward"].tolist() == [1.0, -1.0, -1.0]
    assert objective.tally.take()["reward_errors"] == (1.0, 1)  # an evaluation's are not counted
    zero, _, _ = build(half, on_error="zero")
    with pytest.warns(RuntimeWarning, match="on_error is zero"):
        assert zero.losses(model, batch).tolist() == [-1.0, 0.0, 1.0]


# ---------------------------------------------------------------- encoding


def test_conversations_are_handed_over_as_trl_does(model):
    chats = Dataset.from_list(
        [
            {"chat": [{"role": "user", "content": "Who?"}]},
            {"chat": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]},
        ]
    )
    recorded = Recorded(lambda completions: [len(c[0]["content"]) for c in completions])
    objective, _, batch = build(recorded, Data(train="x", messages="chat", max_tokens=40), TEMPLATE, rows=chats)
    tok = tokenizer(TEMPLATE)
    for row, question in enumerate(["Who?", "Why?"]):
        expected = tok(f"<user>{question}\n<assistant>", add_special_tokens=False).input_ids
        assert batch["input_ids"][row, -len(expected) :].tolist() == expected
    objective.losses(model, batch)
    (call,) = recorded.calls
    assert call["prompts"] == [[{"role": "user", "content": "Who?"}], [{"role": "user", "content": "Why?"}]]
    assert [c[0]["role"] for c in call["completions"]] == ["assistant", "assistant"]


def test_a_prompt_in_a_chat_template_stays_a_text_for_the_judge(model):
    recorded = Recorded()
    objective, _, batch = build(recorded, Data(train="x", prompt="{start}", chat=True, max_tokens=40), TEMPLATE)
    expected = tokenizer(TEMPLATE)("<user>It is\n<assistant>", add_special_tokens=False).input_ids
    assert batch["input_ids"][0, -len(expected) :].tolist() == expected
    objective.losses(model, batch)
    assert recorded.calls[0]["prompts"][0] == "It is"
    assert isinstance(recorded.calls[0]["completions"][0], str)


def test_no_end_of_text_stands_between_prompt_and_completion():
    tok = tokenizer()
    from tokenizers.processors import TemplateProcessing

    tok._tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tok.eos_token_id)])
    assert tok("It is").input_ids[-1] == tok.eos_token_id
    (example, *_) = RewardData(PROMPT, RewardObjective([letters], tok, Generation(max_new_tokens=8))).encode(ROWS)
    assert list(example.prompt) == tok("It is").input_ids[:-1]


def test_prompts_leave_room_for_completions():
    _, data, _ = build(letters, Data(train="x", prompt="{start}", max_tokens=11), max_new_tokens=8)
    assert max(len(e.prompt) for e in data.encode(ROWS)) <= 3
    with pytest.raises(UserError, match=r"data.max_tokens: 8 tokens leave none for a prompt beside a completion of 8"):
        build(letters, Data(train="x", prompt="{start}", max_tokens=8), max_new_tokens=8)


# ---------------------------------------------------------------- what ES makes of it


def es(**options):
    return EsEstimator(
        EvolutionStrategy(**{"type": "es", "population_size": 8, "learning_rate": 1.0, "sigma": 0.02, **options})
    )


def estimated(model, objective, batch, **options):
    engine, key = LocalEngine(model, device="cpu"), Key((0, 3))
    estimate, cost = es(**options).estimate(engine, objective, batch, list(engine.parameters), key)
    return estimate, cost


@pytest.mark.parametrize("members", [1, 4, 8])
def test_the_estimate_does_not_depend_on_who_shares_a_pass(model, members):
    objective, _, batch = build(letters, temperature=0.7)
    whole, cost = estimated(model, objective, batch, members_per_forward=8, micro_batch_size=3)
    parts, other = estimated(model, objective, batch, members_per_forward=members, micro_batch_size=2)
    assert torch.equal(whole.coefficients, parts.coefficients)
    assert whole.coefficients.abs().max() > 0
    assert (cost.loss, cost.tokens, cost.statistics) == (other.loss, other.tokens, other.statistics)
    dense, _ = estimated(
        model, objective, batch, perturbation={"type": "dense", "backup": "model"}, fitness_shaping="none"
    )
    assert dense.coefficients.abs().max() > 0


def test_other_steps_have_other_luck(model):
    objective, _, batch = build(letters, temperature=1.0)
    one, same, other = (objective.seeded(batch, Key((0, step)))["seeds"] for step in (1, 1, 2))
    assert torch.equal(one, same)
    assert not set(one.tolist()) & set(other.tolist())


def test_tokens_of_completions_are_counted(model):
    objective, _, batch = build(letters)
    _, cost = estimated(model, objective, batch)
    mean = cost.statistics["completion_tokens"]
    assert cost.tokens == 8 * int(batch["attention_mask"].sum()) + round(mean * 24)
    assert 0 < mean <= 8
    assert 0 <= cost.statistics["finished"] <= 1


def test_a_reward_that_all_members_get_moves_nothing(model):
    objective, _, batch = build(lambda completions: [1.0] * len(completions))
    _, cost = estimated(model, objective, batch, fitness_shaping="none", antithetic=False)
    assert cost.is_empty
    assert cost.loss == -1
    objective, _, batch = build(letters)
    _, cost = estimated(model, objective, batch, group_baseline="standardize")
    assert not cost.is_empty
    assert cost.statistics["tied_pairs"] in range(5)
    assert cost.statistics["examples_left_out"] in range(3)


def test_prompts_may_begin_alike_at_length(model):
    """The rehearsal, of which all rows must be told apart, sees them begin alike too."""
    rows = [
        {**row, "start": "Tell me, said Alice to the Queen, of all the gardens. " * 2 + row["start"]} for row in ROWS
    ]
    data = PROMPT.model_copy(update={"max_tokens": 96})
    objective, _, batch = build(letters, data, rows=Dataset.from_list(rows))
    found, _ = estimated(model, objective, batch)
    plain, _, _ = build(letters, data)
    plain.rollout.prefill = Prefill(beginnings=False)
    expected, _ = estimated(model, plain, batch)
    assert torch.equal(found.coefficients, expected.coefficients)
    assert found.coefficients.abs().max() > 0


def test_a_rehearsal_judges_nothing(model):
    recorded = Recorded()
    objective, _, batch = build(recorded)
    estimated(model, objective, batch, members_per_forward=8)
    assert [len(call["completions"]) for call in recorded.calls] == [24]
