"""Measures of models on rows, with intervals, and the differences between models by row. Next: `table.py`.

One idea: every model sees the same rows, so the difference is taken row by row, and its interval is that of the mean difference: much
narrower than what the two intervals would say.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from hybrid_opt.config.evaluation import RowSet
from hybrid_opt.engines.local import device_named
from hybrid_opt.engines.ranks import launched_world_size
from hybrid_opt.errors import UserError
from hybrid_opt.estimators.modes import training_mode
from hybrid_opt.models.loading import load_model, load_tokenizer
from hybrid_opt.objectives.batches import length_of
from hybrid_opt.objectives.causal_lm import CausalLmObjective
from hybrid_opt.objectives.contract import Generates, to_device
from hybrid_opt.objectives.data import load_splits
from hybrid_opt.studies.evaluate.subject import BASE, EVALUATED, Subject
from hybrid_opt.studies.results import interval
from hybrid_opt.training.build import refuse_what_does_not_fit, spread
from hybrid_opt.training.run_data import examples_of, objective_of

Values = dict[str, list[float]]
"""Of each measure, a value a row."""
PERPLEXITY = "perplexity"
NATS, TOKENS = "nats", "tokens"
"""Of a language model: the sum of a row's losses, and of how many tokens."""


@dataclass(frozen=True)
class Measured:
    """A measure of a model on a set, and its difference to the base."""

    set: str
    """`own` or `second`."""
    model: str
    """`model` or `base`."""
    measure: str
    rows: int
    value: float | None
    """None where no row could be judged."""
    low: float | None
    high: float | None
    """Ends of the 95 % interval over rows."""
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None

    @property
    def is_told_apart(self) -> bool:
        """Whether the difference's interval leaves 0 out."""
        return self.difference_low is not None and not self.difference_low <= 0 <= self.difference_high

    def row(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self)


def evaluated(
    subject: Subject, rows: int | None, batch_size: int | None, say: Callable[[str], None]
) -> Iterator[Measured]:
    """All models on all sets, set by set.

    Args:
        rows: of each set at most so many, at even distances; None: all.
        batch_size: examples in a forward pass; None: as the run says.

    Raises:
        UserError: a model or rows that cannot be read or do not fit together.
    """
    if launched_world_size() > 1:
        raise UserError("evaluate: it runs in one process; start it without deepspeed or torchrun")
    found: dict[tuple[str, str], Values] = {}
    for label, config in subject.models.items():
        say(f"loading {config.name or 'the random model'} ...")
        with subject.naming(label):
            model = load_model(config, None, subject.seed).to(device_named(subject.device))
            tokenizer = load_tokenizer(config)
        for name, own in subject.sets.items():
            told = f"{label} on {own.data.train}"
            with subject.naming(name):
                found[label, name] = _values(
                    model,
                    tokenizer,
                    own,
                    subject.seed,
                    rows,
                    batch_size or subject.batch_size,
                    partial(_tell, say, told),
                )
        del model
    for name in subject.sets:
        for label in subject.models:
            yield from _summarised(
                name, label, found[label, name], found.get((BASE, name)) if label == EVALUATED else None
            )


@torch.no_grad()
def _values(
    model: Any, tokenizer: Any, own: RowSet, seed: int, rows: int | None, size: int, show: Callable[[int, int], None]
) -> Values:
    """What is measured of each row, in the rows' order."""
    objective, data = objective_of(own.objective, own.data, tokenizer)
    held_out = own.data.validation is not None
    examples = examples_of(own.data, data, load_splits(own.data), seed)[held_out]
    examples = examples if rows is None else spread(examples, rows)
    refuse_what_does_not_fit(model, examples)
    order = sorted(range(len(examples)), key=lambda i: length_of(examples[i]))  # batches with little padding
    values: Values = {}
    with training_mode(model, False):
        for first in range(0, len(order), size):
            some = order[first : first + size]
            batch = to_device(data.collate([examples[i] for i in some]), model.device)
            measures = objective.measures(model, batch)
            if isinstance(objective, CausalLmObjective):
                tokens = objective.tokens(batch)
                measures |= {NATS: measures["loss"] * tokens, TOKENS: tokens}
            for measure, of_each in measures.items():
                into = values.setdefault(measure, [math.nan] * len(examples))
                for i, value in zip(some, of_each.double().tolist(), strict=True):
                    into[i] = value
            show(first + len(some), len(order))
    lost = sum(not math.isfinite(value) for value in values["loss"])
    if lost and not isinstance(objective, Generates):  # whose NaN is a row that could not be judged
        raise UserError(
            f"{own.data.train}: the model's loss is not finite on {lost} of {len(examples)} rows, so it has no mean; the model has diverged, or its "
            "dtype is too narrow"
        )
    return values


def _summarised(name: str, label: str, values: Values, base: Values | None) -> Iterator[Measured]:
    for measure, of_rows in values.items():
        if measure in (NATS, TOKENS):
            continue
        theirs = base.get(measure) if base else None
        difference = (None, None, None)
        if theirs is not None and len(theirs) == len(of_rows):
            difference = interval(_known(a - b for a, b in zip(of_rows, theirs, strict=True)))
        yield Measured(name, label, measure, len(of_rows), *interval(_known(of_rows)), *difference)
    if NATS in values:
        yield Measured(name, label, PERPLEXITY, len(values[NATS]), *perplexity(values[NATS], values[TOKENS]))


def _tell(say: Callable[[str], None], what: str, done: int, of: int) -> None:
    say(f"{what}: {done} of {of}")


def _known(values: Any) -> list[float]:
    """Without rows that could not be judged."""
    return [value for value in values if not math.isnan(value)]


def perplexity(nats: Sequence[float], tokens: Sequence[float]) -> tuple[float, float | None, float | None]:
    """`exp(sum_i L_i / sum_i T_i)` of rows with losses L and T tokens, and the ends of its 95 % interval over rows.

    Of the ratio r the deviations are `L_i - r T_i` (the delta method), and the interval of r is carried through the exponential.
    """
    ratio, mean = sum(nats) / sum(tokens), sum(tokens) / len(tokens)
    _, low, high = interval([(n - ratio * t) / mean for n, t in zip(nats, tokens, strict=True)])
    return _exp(ratio), *(None if end is None else _exp(ratio + end) for end in (low, high))


def _exp(value: float) -> float:
    """As far as float64 goes."""
    return math.exp(min(value, 700.0))
