"""Per-example losses against one unpadded row at a time, and how rows become tokens."""

import json
from functools import cache

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_opt.config.data import Data
from hybrid_opt.errors import UserError
from hybrid_opt.objectives.causal_lm import CausalLmData, CausalLmObjective
from hybrid_opt.objectives.examples import Example, encode_examples
from tests.conftest import GLASS, PROSE, SPAM, tiny_model

TOKENIZER = AutoTokenizer.from_pretrained(GLASS)
EOS = TOKENIZER.eos_token_id
TEMPLATE = "Subject: {subject}\n{body}\nSpam or ham?"
QUESTIONS = [
    {"q": "Good", "a": " morning"},
    {"q": "It is a truth universally acknowledged, that a single man", "a": " must be in want of a wife"},
    {"q": "Where is the girl? She is in the", "a": " house"},
]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [
    {"role": "user", "content": "Hello there, how are you today?"},
    {"role": "assistant", "content": "I am well."},
    {"role": "user", "content": "What is glass?"},
    {"role": "assistant", "content": "A thing one looks through."},
]


@cache
def model_of(kind: str):
    return AutoModelForCausalLM.from_pretrained(GLASS).eval() if kind == "glass" else tiny_model(kind)


def data_for(**config) -> CausalLmData:
    return CausalLmData(Data(train="unused", **config), TOKENIZER)


def questions(**config) -> list[Example]:
    return data_for(prompt="{q}", completion="{a}", **config).encode(Dataset.from_list(QUESTIONS))


def spam_rows(count: int) -> list[dict]:
    return [json.loads(line) for line in SPAM.read_text().splitlines()[:count]]


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def explicit_loss(model, prompt, completion) -> torch.Tensor:
    tokens = torch.tensor([*prompt, *completion])
    log_p = model(tokens[None]).logits[0].double().log_softmax(-1)
    scored = range(max(1, len(prompt)), len(tokens))
    return -sum(log_p[t - 1, tokens[t]] for t in scored) / len(scored)


def random_examples(lengths) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(64, (n,), generator=generator).tolist()  # noqa: E731
    return [Example(draw(prompt), draw(completion)) for prompt, completion in lengths]


EXAMPLES = {
    "glass": lambda: questions(),
    "llama": lambda: random_examples([(1, 1), (20, 9), (3, 5), (12, 1)]),
    "gpt2": lambda: random_examples([(1, 1), (20, 9), (3, 5), (12, 1)]),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_padded_losses_equal_unpadded_rows(kind):
    model, examples = model_of(kind), EXAMPLES[kind]()
    batch = data_for(text="t").collate(examples)
    assert len({len(e.prompt) for e in examples}) > 2
    assert len({len(e.completion) for e in examples}) > 1
    with torch.no_grad():
        expected = torch.stack([explicit_loss(model, e.prompt, e.completion) for e in examples])
        losses = CausalLmObjective().losses(model, batch)
        measures = CausalLmObjective().measures(model, batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=0)
    assert list(measures) == ["loss"]
    assert torch.equal(measures["loss"], losses)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_gradient_of_a_padded_batch_equals_that_of_unpadded_rows(kind):
    model, examples = model_of(kind), EXAMPLES[kind]()
    parameters = list(model.parameters())
    explicit = sum(explicit_loss(model, e.prompt, e.completion) for e in examples) / len(examples)
    padded = CausalLmObjective().losses(model, data_for(text="t").collate(examples)).mean()
    for got, expected in zip(
        torch.autograd.grad(padded, parameters), torch.autograd.grad(explicit, parameters), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_prompt_tokens_do_not_count():
    """The loss times its tokens is what the completion adds to the whole row's negative log-likelihood."""
    model, examples = model_of("glass"), questions()
    with torch.no_grad():
        losses = CausalLmObjective().losses(model, data_for(text="t").collate(examples))
        for example, loss in zip(examples, losses.double(), strict=True):
            row = [*example.prompt, *example.completion]
            whole = explicit_loss(model, [], row) * (len(row) - 1)
            prompt = explicit_loss(model, [], example.prompt) * (len(example.prompt) - 1)
            assert (loss * len(example.completion)).item() == pytest.approx((whole - prompt).item(), abs=1e-4)


@pytest.mark.parametrize("append_eos", [True, False])
def test_append_eos_ends_completions(append_eos):
    for example, row in zip(questions(append_eos=append_eos), QUESTIONS, strict=True):
        assert example.prompt == ids(row["q"])
        assert example.completion == ids(row["a"]) + [EOS] * append_eos


def test_a_tokenizers_own_start_token_begins_the_prompt_alone():
    tokenizer = AutoTokenizer.from_pretrained(GLASS)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    rows = Dataset.from_list([*QUESTIONS, {"q": "the house " * 40, "a": " is"}])
    config = Data(train="unused", prompt="{q}", completion="{a}", max_tokens=40)
    examples = CausalLmData(config, tokenizer).encode(rows)
    assert [e.prompt for e in examples[:3]] == [[bos, *ids(row["q"])] for row in QUESTIONS]
    assert [e.completion for e in examples] == [[*ids(row["a"]), EOS] for row in rows]
    assert examples[3].prompt[:3] == [bos, *ids("the house")[:2]]
    assert 32 < len(examples[3].prompt) + len(examples[3].completion) <= 40


def test_an_empty_completion_is_refused():
    rows = Dataset.from_list([*QUESTIONS, {"q": "Nothing", "a": ""}])
    with pytest.raises(UserError, match=r"data\.completion: row 3"):
        data_for(prompt="{q}", completion="{a}", append_eos=False).encode(rows)


def test_an_empty_prompt_is_refused():
    rows = Dataset.from_list([*QUESTIONS, {"q": "", "a": " x"}])
    with pytest.raises(UserError, match=r"data\.prompt: row 3 gives an empty prompt"):
        data_for(prompt="{q}", completion="{a}").encode(rows)


# ---------------------------------------------------------------- truncation


def test_truncation_shortens_the_longest_column_and_keeps_the_templates_words():
    rows = spam_rows(60)
    longer = 0
    for limit in (32, 48, 64):
        examples = data_for(prompt=TEMPLATE, completion=" {label}", max_tokens=limit).encode(Dataset.from_list(rows))
        for example, row in zip(examples, rows, strict=True):
            full = ids(TEMPLATE.format(**row))
            assert example.completion == [*ids(f" {row['label']}"), EOS]
            if len(full) + len(example.completion) <= limit:
                assert example.prompt == full
                continue
            longer += 1
            assert len(example.prompt) + len(example.completion) <= limit
            text = TOKENIZER.decode(example.prompt)
            assert text.startswith("Subject: ")
            assert text.endswith("\nSpam or ham?")
            cut = dict(zip(("subject", "body"), text[9:].removesuffix("\nSpam or ham?").split("\n", 1), strict=True))
            whole = {name: TOKENIZER.decode(ids(row[name])) for name in cut}
            assert all(whole[name].startswith(cut[name]) for name in cut)
            longest = max(cut, key=lambda name: len(row[name]))
            assert len(cut[longest]) < len(whole[longest])
    assert longer > 100


def test_truncation_leaves_little_room_unused():
    rows = [r for r in spam_rows(60) if len(r["body"]) > 200]
    examples = data_for(prompt="{body}", completion=" {label}", max_tokens=40).encode(Dataset.from_list(rows))
    used = [len(e.prompt) + len(e.completion) for e in examples]
    assert max(used) <= 40
    assert sum(used) / len(used) > 32


def test_a_short_column_stays_whole_while_a_longer_one_is_cut():
    row = {"subject": "glass", "body": "the house " * 40, "label": "ham"}
    (example,) = data_for(prompt=TEMPLATE, completion=" {label}", max_tokens=40).encode(Dataset.from_list([row]))
    assert TOKENIZER.decode(example.prompt).startswith("Subject: glass\nthe house the house")


def test_too_few_tokens_names_the_number_that_is_enough():
    row = {"subject": "glass", "body": "the house " * 40, "label": "ham"}

    def encode(limit):
        return data_for(prompt=TEMPLATE, completion=" {label}", max_tokens=limit).encode(Dataset.from_list([row]))

    needed = len(ids(TEMPLATE.format(subject="", body=""))) + len([*ids(" ham"), EOS])
    with pytest.raises(
        UserError, match=rf"data\.max_tokens: {needed - 1} tokens are too few for row 0: .* need {needed}$"
    ):
        encode(needed - 1)
    (example,) = encode(needed)
    assert len(example.prompt) + len(example.completion) == needed


# ---------------------------------------------------------------- packed text


@pytest.mark.parametrize("append_eos", [True, False])
def test_packed_blocks_are_the_stream_cut_up(append_eos):
    paragraphs = PROSE.read_text(encoding="utf-8").split("\n\n")[20:40]
    stream = [token for text in paragraphs for token in ids(text) + [EOS] * append_eos]
    rows = Dataset.from_list([{"t": text} for text in paragraphs])
    examples = data_for(text="t", max_tokens=64, append_eos=append_eos).encode(rows)
    assert len(examples) == len(stream) // 64 > 3
    assert all(e.prompt == () and len(e.completion) == 64 for e in examples)
    assert [token for e in examples for token in e.completion] == stream[: len(examples) * 64]


@pytest.mark.parametrize("block", [2, 48])
def test_packed_losses_are_those_of_every_token_but_the_first(block):
    data = data_for(text="t", max_tokens=block)
    examples = data.encode(Dataset.from_list([{"t": PROSE.read_text(encoding="utf-8")[:3000]}]))[:5]
    model = model_of("glass")
    with torch.no_grad():
        losses = CausalLmObjective().losses(model, data.collate(examples))
        expected = torch.stack([explicit_loss(model, [], e.completion) for e in examples])
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=0)


def test_packing_less_than_a_block_is_refused():
    with pytest.raises(UserError, match=rf"have {len(ids('a house')) + 1} tokens, not enough for one block of 64"):
        data_for(text="t", max_tokens=64).encode(Dataset.from_list([{"t": "a house"}]))


# ---------------------------------------------------------------- chat


def chat_encode(messages: list, template: str | None = CHAT, **config) -> Example:
    tokenizer = AutoTokenizer.from_pretrained(GLASS)
    tokenizer.chat_template = template
    rows = Dataset.from_list([{"turns": messages}])
    (example,) = encode_examples(rows, Data(train="unused", messages="turns", **config), tokenizer)
    return example


def chat_text(messages) -> str:
    return "".join(f"<{m['role']}>{m['content']}<eos>\n" for m in messages)


def test_the_last_assistant_turn_is_learnt_with_its_end():
    example = chat_encode(TURNS)
    assert example.completion == [*ids("A thing one looks through."), EOS, *ids("\n")]
    assert example.prompt == ids(chat_text(TURNS[:-1]) + "<assistant>")


def test_a_long_chat_is_cut_from_the_left():
    whole = chat_encode(TURNS)
    limit = len(whole.completion) + 9
    assert chat_encode(TURNS, max_tokens=limit) == Example(whole.prompt[-9:], whole.completion)
    with pytest.raises(UserError, match=f"too few for row 0: its answer has {len(whole.completion)}"):
        chat_encode(TURNS, max_tokens=len(whole.completion))


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (TURNS, None, "the tokenizer has no chat template"),
        (TURNS[:-1], CHAT, "ends with the assistant's answer"),
        (TURNS[1:2], CHAT, "ends with the assistant's answer"),
        (TURNS, "{{ messages | length }}" + CHAT, "changes earlier messages"),
    ],
)
def test_chats_that_cannot_be_used(messages, template, message):
    with pytest.raises(UserError, match=message):
        chat_encode(messages, template)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"prompt": "{qq}", "completion": "{a}"}, "data.prompt"),
        ({"prompt": "{q}", "completion": "{aa}"}, "data.completion"),
        ({"text": "qq"}, "data.text"),
        ({"messages": "qq"}, "data.messages"),
    ],
)
def test_an_unknown_column_is_named_with_its_key(config, key):
    with pytest.raises(UserError, match=rf"^{key}: there is no column '(qq|aa)'.*columns: q, a$"):
        data_for(**config).encode(Dataset.from_list(QUESTIONS))
