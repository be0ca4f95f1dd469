"""What a run file may say about data: where rows come from, and how a row becomes tokens. Next: `tasks.py`, then `objectives.py`."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator
from typing_extensions import Self

from hybrid_opt.config.strict import Fraction, Strict, Text
from hybrid_opt.config.tasks import BuiltInTask, Task


class Data(Strict):
    """Where examples come from and how a row becomes tokens."""

    train: Text | BuiltInTask
    """A file (.jsonl, .json, .csv, .parquet, .txt), a folder saved with `save_to_disk`, a hub id, or a built-in task such as
    `{task: arithmetic, rows: 2000}`."""
    subset: str | None = None
    """Name of the hub dataset's configuration."""
    split: str = "train"
    """Split of `train` to train on."""
    validation: Text | Fraction | BuiltInTask | None = None
    """Held-out rows: a file, the name of a split of `train`, a fraction of the training rows to set aside, or a built-in task."""
    prompt: str | None = None
    """Template over the columns; its tokens are not part of the loss."""
    completion: str | None = None
    """Template of what the model learns to write after the prompt; a reward needs none."""
    choices: tuple[str, ...] | None = None
    """For `objective: {type: choice}`: all the completions to choose from."""
    chat: bool = False
    """Put prompt and completion, as the messages of a user and an assistant, into the tokenizer's chat template."""
    messages: str | None = None
    """Instead of prompt and completion: the column of chat messages. The last one is learnt, or (for a reward) answered."""
    text: str | None = None
    """Instead of prompt and completion: the column of plain text, packed into blocks of max_tokens."""
    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Longest example. A longer prompt is shortened at its longest column; a completion is never cut."""
    append_eos: bool = True
    """End each completion with the end-of-text token (causal_lm), and separate packed texts with it."""

    @model_validator(mode="after")
    def _one_format(self) -> Self:
        given = [name for name in ("prompt", "messages", "text") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "say how a row becomes tokens with exactly one of prompt (with completion), messages or text; "
                f"given: {', '.join(given) or 'none'}"
            )
        if self.prompt is None and (self.completion is not None or self.chat):
            raise ValueError(f"{'chat' if self.chat else 'completion'} needs prompt, which is missing")
        if self.choices is not None and len(set(self.choices)) < max(2, len(self.choices)):
            raise ValueError("choices needs at least two different completions, each written once")
        return self

    @model_validator(mode="after")
    def _splits_suit_source(self) -> Self:
        if not isinstance(self.train, Task):
            return self
        if self.split != "train" or self.subset is not None:
            raise ValueError(
                "split and subset are for files and hub ids, but train is a built-in task; write split within the task"
            )
        name = self.validation
        if isinstance(name, str) and not (Path(name).suffix or os.path.exists(name)):
            raise ValueError(
                f"validation {name!r} is no file, and train is a built-in task, which has no splits by name; write the task again "
                "with split: held_out, or a fraction such as 0.1"
            )
        return self
