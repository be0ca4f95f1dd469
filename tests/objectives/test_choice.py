"""Choice scores against the full unpadded rows, one at a time."""

from functools import cache

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_opt.config.data import Data
from hybrid_opt.errors import UserError
from hybrid_opt.objectives.choice import ChoiceData
from tests.conftest import GLASS, tiny_model

TOKENIZER = AutoTokenizer.from_pretrained(GLASS)
PROMPTS = [
    "Is it",
    "Where is the girl? She is in the house, and she looks at the glass. Is it true?",
    "He said that she",
]
CHOICES = {
    "one token each": (" no", " not", " good"),
    "different lengths": (" no", " yes", " a universally acknowledged truth"),
    "shared first token": (" spam", " sport", " good"),
    "a prefix of another": (" ham", " ham sandwich", " ha", " no"),
}


@cache
def model_of(kind: str):
    if kind == "glass":
        return AutoModelForCausalLM.from_pretrained(GLASS).eval()
    return tiny_model(kind, vocab_size=len(TOKENIZER), **({"n_positions": 64} if kind == "gpt2" else {}))


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def choice_data(choices, **config) -> ChoiceData:
    return ChoiceData(Data(train="x", prompt="{q}", completion="{a}", choices=choices, **config), TOKENIZER)


def encode(data: ChoiceData, labels):
    return data.encode(Dataset.from_list([{"q": q, "a": a} for q, a in zip(PROMPTS, labels, strict=True)]))


def explicit_scores(model, prompt, choices) -> torch.Tensor:
    scores = []
    for choice in choices:
        row = torch.tensor([*prompt, *choice])
        log_p = model(row[None]).logits[0].double().log_softmax(-1)
        scores.append(sum(log_p[t - 1, row[t]] for t in range(len(prompt), len(row))))
    return torch.stack(scores)


def test_the_choices_have_the_forms_they_are_named_for():
    tokens = {name: [ids(text) for text in choices] for name, choices in CHOICES.items()}
    assert {len(t) for t in tokens["one token each"]} == {1}
    assert len({len(t) for t in tokens["different lengths"]}) == 3
    assert tokens["shared first token"][0][:-1] == tokens["shared first token"][1][:-1] != []
    short, long, *_ = tokens["a prefix of another"]
    assert long[: len(short)] == short


@pytest.mark.parametrize("kind", ["glass", "gpt2", "llama"])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_scores_losses_and_accuracy_equal_rows_one_at_a_time(kind, choices):
    model, data = model_of(kind), choice_data(choices)
    examples = encode(data, [choices[1], choices[0], choices[2]])
    batch = data.collate(examples)
    with torch.no_grad():
        expected = torch.stack([explicit_scores(model, ids(q), [ids(c) for c in choices]) for q in PROMPTS])
        scores = data.objective.scores(model, batch)
        losses = data.objective.losses(model, batch)
        measures = data.objective.measures(model, batch)
    torch.testing.assert_close(scores.double(), expected, atol=1e-4, rtol=1e-6)
    labels = [1, 0, 2]
    assert batch["labels"].tolist() == labels
    by_hand = [torch.logsumexp(expected[i], 0) - expected[i, label] for i, label in enumerate(labels)]
    torch.testing.assert_close(losses.double(), torch.stack(by_hand), atol=1e-4, rtol=1e-6)
    assert torch.equal(measures["loss"], losses)
    likeliest = [max(range(len(choices)), key=lambda c, row=row: row[c]) for row in expected.tolist()]
    assert measures["accuracy"].tolist() == [float(a == b) for a, b in zip(likeliest, labels, strict=True)]


def test_accuracy_is_one_where_the_label_is_the_likeliest_choice():
    model, choices = model_of("glass"), CHOICES["different lengths"]
    data = choice_data(choices)
    with torch.no_grad():
        best = [int(explicit_scores(model, ids(q), [ids(c) for c in choices]).argmax()) for q in PROMPTS]
        labels = [choices[best[0]], choices[(best[1] + 1) % 3], choices[best[2]]]
        accuracy = data.objective.measures(model, data.collate(encode(data, labels)))["accuracy"]
    assert accuracy.tolist() == [1, 0, 1]


def test_gradient_equals_that_of_rows_one_at_a_time():
    model, choices = model_of("glass"), CHOICES["a prefix of another"]
    data, parameters = choice_data(choices), list(model.parameters())
    labels = [2, 0, 1]
    loss = data.objective.losses(model, data.collate(encode(data, [choices[i] for i in labels]))).mean()
    scores = [explicit_scores(model, ids(q), [ids(c) for c in choices]) for q in PROMPTS]
    explicit = sum(s.logsumexp(0) - s[i] for s, i in zip(scores, labels, strict=True)) / len(labels)
    for got, expected in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(explicit, parameters), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("one token each", 1), ("different lengths", 3), ("shared first token", 2), ("a prefix of another", 3)],
)
def test_choices_that_begin_alike_share_a_row(name, rows):
    """` ha` and ` no` are one token and share the bare prompt's row."""
    data = choice_data(CHOICES[name])
    batch = data.collate(encode(data, CHOICES[name][:1] * 3))
    longest = max(len(ids(q)) for q in PROMPTS) + max(len(ids(c)) for c in CHOICES[name]) - 1
    assert batch["input_ids"].shape == batch["position_ids"].shape == (3, rows, longest)


def test_prompt_and_longest_choice_fit_into_max_tokens():
    choices = CHOICES["different lengths"]
    room = 20 - max(len(ids(c)) for c in choices)
    assert len(ids(PROMPTS[1])) > room
    prompts = [e.prompt for e in encode(choice_data(choices, max_tokens=20), choices)]
    assert max(map(len, prompts)) <= room
    assert prompts[0] == ids(PROMPTS[0])
    assert PROMPTS[1].startswith(TOKENIZER.decode(prompts[1]))


def test_a_completion_that_is_no_choice_is_refused():
    with pytest.raises(UserError, match=r"row 1 gives ' nott', .* \[' no', ' not'\] \(did you mean ' not'\?\)"):
        encode(choice_data((" no", " not")), [" no", " nott", " no"])


def test_a_choice_without_tokens_is_refused():
    with pytest.raises(UserError, match=r"data\.choices: '' gives no token"):
        choice_data(("", " no"))
