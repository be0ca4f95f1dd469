"""From rows to tokens: prompt and completion, chat messages, or packed text. Next: `causal_lm.py`, `choice.py`, `reward.py`.

One idea: every format becomes the same thing, tokens that are only read (the prompt) and tokens that are learnt (the
completion). What is too long is cut from the prompt, where the row's own text is longest, never from the completion.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hybrid_opt.config.data import Data
from hybrid_opt.errors import UserError
from hybrid_opt.objectives.template import Template


@dataclass(frozen=True)
class Example:
    """Token ids of one example."""

    prompt: Sequence[int]
    """Read, but not part of the loss."""
    completion: Sequence[int]
    """Learnt."""


def encode_examples(rows: Dataset, config: Data, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Examples for causal language modelling, in whichever format the configuration describes.

    Raises:
        UserError: a missing column or value, a completion that leaves no room for a prompt, or messages that do not fit
            the chat template.
    """
    if config.text is not None:
        return _packed(rows, config, tokenizer)
    if config.messages is not None:
        return [
            _chat(row[config.messages], i, config, tokenizer)
            for i, row in _rows(rows, config.messages, "data.messages")
        ]
    texts = _rendered(rows, config.completion, "data.completion")
    if config.chat:
        turns = zip(_rendered(rows, config.prompt, "data.prompt"), texts, strict=True)
        conversations = ([message("user", prompt), message("assistant", text)] for prompt, text in turns)
        return [_chat(messages, i, config, tokenizer) for i, messages in enumerate(conversations)]
    ends = [tokenizer.eos_token_id] if config.append_eos and tokenizer.eos_token_id is not None else []
    completions = [tokens + ends for tokens in tokenize(texts, tokenizer, special_tokens=False)]
    for i in (i for i, tokens in enumerate(completions) if not tokens):
        raise UserError(f"data.completion: row {i} gives an empty completion; there is nothing to learn")
    prompts = encode_prompts(rows, config, tokenizer, [config.max_tokens - len(tokens) for tokens in completions])
    return [Example(*pair) for pair in zip(prompts, completions, strict=True)]


def message(role: str, content: str) -> dict[str, str]:
    """A message of a chat."""
    return {"role": role, "content": content}


def encode_questions(
    rows: Dataset, config: Data, tokenizer: PreTrainedTokenizerBase, room: int
) -> tuple[list[list[int]], list[str | list[dict[str, str]]]]:
    """Prompts to be answered: their token ids, at most `room`, and what they say, as a text or as a chat's messages.

    Raises:
        UserError: see `encode_examples`.
    """
    if config.messages is not None:
        shown = [_question(row[config.messages], i) for i, row in _rows(rows, config.messages, "data.messages")]
        return [_asked(messages, i, tokenizer)[1][-room:] for i, messages in enumerate(shown)], shown
    texts = _rendered(rows, config.prompt, "data.prompt")
    if config.chat:
        asked = ([message("user", text)] for text in texts)
        return [_asked(messages, i, tokenizer)[1][-room:] for i, messages in enumerate(asked)], texts
    return encode_prompts(rows, config, tokenizer, [room] * len(rows)), texts


def _rendered(rows: Dataset, template: str, key: str) -> list[str]:
    parsed = Template.parse(template, key)
    parsed.check(rows.column_names)
    return [parsed.render(parsed.values(row, i)) for i, row in enumerate(rows)]


def encode_prompts(
    rows: Dataset, config: Data, tokenizer: PreTrainedTokenizerBase, room: Sequence[int]
) -> list[list[int]]:
    """Prompts that fit: where one is longer than its `room` (tokens), its longest column is shortened at the end."""
    template = Template.parse(config.prompt, "data.prompt")
    template.check(rows.column_names)
    values = [template.values(row, i) for i, row in enumerate(rows)]
    prompts = [_open_ended(tokens, tokenizer) for tokens in tokenize([template.render(v) for v in values], tokenizer)]
    for i, tokens in enumerate(prompts):
        if len(tokens) > room[i]:
            prompts[i] = _shortened(template, values[i], tokenizer, room[i], i, config.max_tokens)
    for i in (i for i, tokens in enumerate(prompts) if not tokens):
        raise UserError(f"data.prompt: row {i} gives an empty prompt; there is nothing to predict a completion from")
    return prompts


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, special_tokens: bool = True) -> list[list[int]]:
    """Token ids of texts; with the special tokens that the tokenizer puts around a text by itself, or without."""
    # verbose=False: a text beyond the model's own limit is shortened later, so no warning about it.
    return tokenizer(list(texts), add_special_tokens=special_tokens, verbose=False).input_ids if texts else []


def _open_ended(prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt without the end-of-text token that some tokenizers put after every text: it is to be gone on with."""
    return prompt[:-1] if prompt[-1:] == [tokenizer.eos_token_id] and len(prompt) > 1 else prompt


def _shortened(
    template: Template, values: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, room: int, row: int, limit: int
) -> list[int]:
    values = dict(values)
    while len(tokens := _open_ended(tokenize([template.render(values)], tokenizer)[0], tokenizer)) > room:
        longest = max(values, key=lambda column: len(values[column]), default=None)
        if longest is None or not values[longest]:
            raise UserError(
                f"data.max_tokens: {limit} tokens are too few for row {row}: the prompt's own words and the completion need "
                f"{limit - room + len(tokens)}"
            )
        text = values[longest]
        length = len(tokenize([text], tokenizer, special_tokens=False)[0])
        keep = max(0, length - (len(tokens) - room)) / max(1, length)
        values[longest] = text[: min(len(text) - 1, int(len(text) * keep))]
    return tokens


def _rows(rows: Dataset, column: str, key: str) -> Iterable[tuple[int, dict[str, Any]]]:
    Template(key, (("", column),)).check(rows.column_names)
    return enumerate(rows)


def _chat(messages: Any, row: int, config: Data, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The last message is the completion, with the end-of-turn token that the chat template gives it."""
    if not _is_chat(messages) or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(
            f"data.messages: row {row}: expected a list of {{role, content}} that ends with the assistant's answer"
        )
    before, prompt = _asked(messages[:-1], row, tokenizer)
    whole = _templated(messages, row, tokenizer)
    if not whole.startswith(before):
        raise UserError(f"data.messages: row {row}: the chat template changes earlier messages when an answer is added")
    (completion,) = tokenize([whole[len(before) :]], tokenizer, special_tokens=False)
    room = config.max_tokens - len(completion)
    if room < 1:
        raise UserError(
            f"data.max_tokens: {config.max_tokens} tokens are too few for row {row}: its answer has {len(completion)}"
        )
    return Example(prompt[-room:], completion)


def _is_chat(messages: Any) -> bool:
    return isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)


def _question(messages: Any, row: int) -> list[dict[str, str]]:
    """The messages up to the one that is to be answered; an answer at the end is left out."""
    question = messages[:-1] if _is_chat(messages) and messages and messages[-1]["role"] == "assistant" else messages
    if not _is_chat(question) or not question:
        raise UserError(f"data.messages: row {row}: expected a list of {{role, content}} with a message to answer")
    return question


def _asked(messages: list[dict[str, str]], row: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """Messages up to where the assistant's answer begins, as text and token ids; the template's own special tokens are all there are."""
    text = _templated(messages, row, tokenizer, add_generation_prompt=True)
    return text, tokenize([text], tokenizer, special_tokens=False)[0]


def _templated(messages: list[dict[str, str]], row: int, tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    if tokenizer.chat_template is None:
        raise UserError("data: the tokenizer has no chat template; use prompt and completion without chat or messages")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program, and refuses messages in its own way
        raise UserError(f"data.messages: row {row}: the chat template refuses it: {error}") from None


def _packed(rows: Dataset, config: Data, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Texts one after another, cut into blocks of exactly max_tokens; the rest at the end is left out."""
    texts = [row[config.text] or "" for _, row in _rows(rows, config.text, "data.text")]
    for i in (i for i, text in enumerate(texts) if not isinstance(text, str)):
        raise UserError(f"data.text: row {i}: expected a text in column {config.text!r}, found {texts[i]!r}")
    # A text begins as the tokenizer would begin it: some models are lost without their first token.
    begins = [tokenizer.bos_token_id] if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else []
    ends = [tokenizer.eos_token_id] if config.append_eos and tokenizer.eos_token_id is not None else []
    stream = [t for tokens in tokenize(texts, tokenizer, special_tokens=False) for t in (*begins, *tokens, *ends)]
    blocks = [stream[i : i + config.max_tokens] for i in range(0, len(stream), config.max_tokens)]
    blocks = [block for block in blocks if len(block) == config.max_tokens]
    if not blocks:
        raise UserError(
            f"data.max_tokens: the texts have {len(stream)} tokens, not enough for one block of {config.max_tokens}"
        )
    return [Example((), block) for block in blocks]
