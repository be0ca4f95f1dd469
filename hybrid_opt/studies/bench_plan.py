"""What `hybrid-opt bench` measures: its rows, and the cases that its options name; no torch. Next: `bench_rows.py`.

One idea: a case is a model in one dtype at one shape, and everything wrong with the options is said before any model is
loaded.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from hybrid_opt.config.engines import LocalEngine
from hybrid_opt.config.run import Model
from hybrid_opt.errors import UserError, did_you_mean

ROWS = (
    "inference",
    "es_low_rank",
    "es_dense",
    "mezo_loop",
    "backprop_sgd",
    "backprop_adamw",
    "backprop_checkpointing",
    "lora",
)
"""In the order in which they are measured; every row takes one step over the same members * examples * tokens."""
GENERATION_ROWS = ("generate", "es_generate", "es_generate_shared", "es_generate_common")
"""Measured when they are named, after the others: members * examples prompts of so many tokens, after which as many are written."""
MEMBER_ROWS = ("inference", "es_low_rank", "es_dense", "mezo_loop", *GENERATION_ROWS)
"""Rows whose step is one evaluation for each member; the others' step is one evaluation of all rows together."""
DTYPES = get_args(Model.model_fields["dtype"].annotation)
DEVICES = ("auto", "cpu", "cuda")
_MASTER_WEIGHTS = LocalEngine.model_fields["master_weights"]


@dataclass(frozen=True)
class Case:
    """One model in one dtype at one shape."""

    model: str
    """Alias, folder or hub id."""
    dtype: str
    """Type of the model's weights."""
    members: int
    """Population size; MeZO evaluates half as many pairs."""
    examples: int
    """Examples that each member sees."""
    tokens: int
    """Tokens of an example."""
    device: str
    """`auto`, `cpu` or `cuda`."""
    members_per_forward: int | None
    """Of es_low_rank and of ES on what members write; None: the estimator's default."""
    master_weights: str | None
    """As in a run file's `engine` section, for all rows; None: each row's own, see `master_weights_of`."""
    new_tokens: int = 16
    """Tokens that a row of `GENERATION_ROWS` writes after each example."""

    @property
    def title(self) -> str:
        """The case in words."""
        return f"{self.dtype}, {self.members} members x {self.examples} examples x {self.tokens} tokens"

    def length(self, names: Sequence[str]) -> int:
        """Most tokens of a sequence in the rows of these names."""
        return self.tokens + self.new_tokens * any(name in GENERATION_ROWS for name in names)


def plan_cases(
    model: str,
    dtypes: Sequence[str],
    members: Sequence[int],
    batch: Sequence[int],
    tokens: Sequence[int],
    *,
    device: str = "auto",
    members_per_forward: int | None = None,
    master_weights: str | None = None,
    new_tokens: Sequence[int] = (Case.new_tokens,),
) -> list[Case]:
    """Every dtype at every shape. Shapes are the four lists of numbers side by side; a list of one serves all.

    Args:
        members_per_forward: members that share a forward pass in low rank ES; None: the estimator's default.
        master_weights: how updates add up below float32; None: each row's own.
        new_tokens: tokens that a row of `GENERATION_ROWS` writes after each example.

    Raises:
        UserError: an option's value cannot be used, or the lists are of different lengths.
    """
    for dtype in dtypes:
        _one_of("--dtype", dtype, DTYPES)
    _one_of("--device", device, DEVICES)
    if master_weights is not None:
        _one_of("--master-weights", master_weights, get_args(_MASTER_WEIGHTS.annotation))
    if master_weights == "stochastic_rounding" and "float16" in dtypes:
        raise UserError(
            "command line: --master-weights stochastic_rounding rounds to bfloat16, not to float16; write fp32 or none, or "
            "--dtype bfloat16"
        )
    if members_per_forward is not None:
        _at_least("--members-per-forward", members_per_forward, 1)
    shapes = list(_shapes(members, batch, tokens, new_tokens))
    return [
        Case(model, dtype, m, b, t, device, members_per_forward, master_weights, new)
        for dtype in dtypes
        for m, b, t, new in shapes
    ]


def master_weights_of(row: str, case: Case) -> str:
    """How a row's updates add up: ES in bfloat16 by stochastic rounding, which needs no memory, and the rest in float32."""
    if case.master_weights is not None:
        return case.master_weights
    return "stochastic_rounding" if row.startswith("es_") and case.dtype == "bfloat16" else "fp32"


def reference_of(row: str) -> str:
    """The row with which a row is compared."""
    return "generate" if row in GENERATION_ROWS else "inference"


def plan_rows(names: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """The rows with these names and those with which they are compared, in the order of measurement, and lines on what was left out.

    No names: all of `ROWS`.

    Raises:
        UserError: there is no such row.
    """
    known = (*ROWS, *GENERATION_ROWS)
    for name in names:
        _one_of("--rows", name, known)
    wanted = names or ROWS
    references = {reference_of(name) for name in wanted}
    chosen = [name for name in known if name in references or name in wanted]
    if "lora" in chosen and importlib.util.find_spec("peft") is None:
        chosen.remove("lora")
        return chosen, ["lora is left out: the library peft is not installed (pip install 'hybrid-opt[peft]')"]
    return chosen, []


def check_json(path: Path | None) -> None:
    """Whether the file could be written at the end.

    Raises:
        UserError: its folder is not there, or it is no place for a file.
    """
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"command line: --json {path}: there is no folder {folder}; make it, or choose another file")
    if path.is_dir():
        raise UserError(f"command line: --json {path} is a folder; write a file's name, such as {path / 'bench.json'}")
    if not os.access(folder, os.W_OK):
        raise UserError(f"command line: --json {path}: the folder {folder} cannot be written to; choose another file")


def check_ranks(ranks: int, rows: Sequence[str]) -> None:
    """Whether `--distributed` can start this many ranks.

    Raises:
        UserError: it cannot, or is told to measure rows of the other table.
    """
    _at_least("--ranks", ranks, 2)
    if rows:
        raise UserError("command line: --rows chooses among the rows without --distributed; drop one of the two")


def check_repeats(repeats: int) -> None:
    """Whether there is anything to take a median of.

    Raises:
        UserError: there is not.
    """
    _at_least("--repeats", repeats, 1)


def _shapes(
    members: Sequence[int], batch: Sequence[int], tokens: Sequence[int], new_tokens: Sequence[int]
) -> Iterator[tuple[int, int, int, int]]:
    for m in members:
        _suits_es(m)
    for b in batch:
        _at_least("--batch", b, 1)
    for t in tokens:
        _at_least("--tokens", t, 2)  # a token is predicted from the ones before
    for new in new_tokens:
        _at_least("--new-tokens", new, 1)
    lists = {"--members": members, "--batch": batch, "--tokens": tokens, "--new-tokens": new_tokens}
    longest = max(lists, key=lambda option: len(lists[option]))
    count = len(lists[longest])
    for option, values in lists.items():
        if len(values) not in (1, count):
            raise UserError(
                f"command line: {option} is given {len(values)} times, but {longest} {count} times; shapes are made from "
                f"them side by side, so give {option} once or {count} times"
            )
    return zip(*(values if len(values) == count else list(values) * count for values in lists.values()), strict=True)


def _suits_es(members: int) -> None:
    if members < 6 or members % 2:
        raise UserError(
            f"command line: --members {members}: members come in antithetic pairs and their losses are standardized, so write "
            f"an even number from 6 on, such as {max(6, members + members % 2)}"
        )


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"command line: {option} {value}: write {least} or more")


def _one_of(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(
            f"command line: {option} {value!r}: write one of {', '.join(known)}{did_you_mean(value, known)}"
        )
