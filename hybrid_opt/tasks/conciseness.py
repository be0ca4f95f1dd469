"""Answers as long as a reference, whatever they say: the conciseness task of ES at Scale. Next: `arithmetic.py`.

One idea: a reward that has no gradient, and that every model can improve from its first step.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from hybrid_opt.config.tasks import Conciseness
from hybrid_opt.tasks.completions import references, text_of

COLUMNS = ("question", "answer")


def conciseness(
    prompts: Sequence[Any], completions: Sequence[Any], column: str = "answer", **columns: Any
) -> list[float | None]:
    """`-|len(completion) - len(reference)|` in characters: 0 at best (TRL's reward function; no reference: None).

    Source: ES at Scale (arXiv 2509.24372) and its code, `es_fine-tuning_conciseness.py`. There the length is that of the whole
    decoded sequence, prompt included, which shifts all completions of a prompt alike; here it is the completion's.

    Args:
        column: where the references are.
    """
    return [
        None if reference is None else -float(abs(len(text_of(completion)) - len(str(reference))))
        for completion, reference in zip(completions, references(columns, column), strict=True)
    ]


def candidates(task: Conciseness) -> Iterator[tuple[str, dict[str, Any]]]:
    """Questions with their rows, each once, in random order."""
    pairs = list(PAIRS)
    random.Random(task.seed).shuffle(pairs)
    for question, answer in pairs:
        yield question, {"question": question, "answer": answer}


PAIRS = (
    ("What is the capital of Norway?", "Oslo"),
    ("How many legs does a spider have?", "8"),
    ("Is the sun a planet?", "No"),
    ("What do bees make?", "Honey"),
    ("Which month comes after May?", "June"),
    ("Compute 12 - 5.", "7"),
    ("What is the opposite of cold?", "Hot"),
    ("What color is fresh snow?", "White"),
    ("Do fish live in water?", "Yes"),
    ("What is frozen water called?", "Ice"),
    ("Which is heavier, a feather or an anvil?", "An anvil"),
    ("How many minutes are in two hours?", "120"),
    ("What is the first letter of the English alphabet?", "A"),
    ("Which animal barks?", "A dog"),
    ("Is 9 an even number?", "No"),
    ("What is 6 times 7?", "42"),
    ("Name the planet we live on.", "Earth"),
    ("All cats are animals, and Tom is a cat. Is Tom an animal?", "Yes"),
    ("What do we call a baby sheep?", "A lamb"),
    ("Which season follows winter?", "Spring"),
    ("What is half of 30?", "15"),
    ("In which direction does the sun set?", "West"),
    ("What metal is attracted to a magnet?", "Iron"),
    ("Spell the word for the number 3.", "three"),
    ("Which ocean lies between Europe and America?", "The Atlantic"),
    ("What is the square root of 81?", "9"),
    ("Can penguins fly?", "No"),
    ("What does a thermometer measure?", "Temperature"),
    ("How many sides has a hexagon?", "6"),
    ("Which word is longer, sea or ocean?", "Ocean"),
)
"""Questions and references."""
