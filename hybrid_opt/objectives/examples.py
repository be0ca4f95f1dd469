"""From rows to tokens: prompt and completion, chat messages, or packed text. Next: `causal_lm.py`, `choice.py`.

One idea: every format becomes the same thing, tokens that are only read (the prompt) and tokens that are learnt (the
completion). What is too long is cut from the prompt, where the row's own text is longest, never from the completion.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hybrid_opt.config.run import Data
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
    completion = Template.parse(config.completion, "data.completion")
    completion.check(rows.column_names)
    ends = [tokenizer.eos_token_id] if config.append_eos and tokenizer.eos_token_id is not None else []
    texts = [completion.render(completion.values(row, i)) for i, row in enumerate(rows)]
    completions = [tokens + ends for tokens in tokenize(texts, tokenizer, special_tokens=False)]
    for i in (i for i, tokens in enumerate(completions) if not tokens):
        raise UserError(f"data.completion: row {i} gives an empty completion; there is nothing to learn")
    prompts = encode_prompts(rows, config, tokenizer, [config.max_tokens - len(tokens) for tokens in completions])
    return [Example(*pair) for pair in zip(prompts, completions, strict=True)]


def encode_prompts(
    rows: Dataset, config: Data, tokenizer: PreTrainedTokenizerBase, room: Sequence[int]
) -> list[list[int]]:
    """Prompts that fit: where one is longer than its `room` (tokens), its longest column is shortened at the end."""
    template = Template.parse(config.prompt, "data.prompt")
    template.check(rows.column_names)
    values = [template.values(row, i) for i, row in enumerate(rows)]
    prompts = tokenize([template.render(v) for v in values], tokenizer)
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


def _shortened(
    template: Template, values: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, room: int, row: int, limit: int
) -> list[int]:
    values = dict(values)
    while len(tokens := tokenize([template.render(values)], tokenizer)[0]) > room:
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
    if tokenizer.chat_template is None:
        raise UserError("data.messages: the tokenizer has no chat template; use prompt and completion")
    chat = isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    if not chat or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(
            f"data.messages: row {row}: expected a list of {{role, content}} that ends with the assistant's answer"
        )
    try:
        before = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program, and refuses messages in its own way
        raise UserError(f"data.messages: row {row}: the chat template refuses it: {error}") from None
    if not whole.startswith(before):
        raise UserError(f"data.messages: row {row}: the chat template changes earlier messages when an answer is added")
    prompt, completion = tokenize([before, whole[len(before) :]], tokenizer, special_tokens=False)
    room = config.max_tokens - len(completion)
    if room < 1:
        raise UserError(
            f"data.max_tokens: {config.max_tokens} tokens are too few for row {row}: its answer has {len(completion)}"
        )
    return Example(prompt[-room:], completion)


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
