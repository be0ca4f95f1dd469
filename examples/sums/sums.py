"""One-digit sums in a strict format: prompt, completion, and what an answer is worth. Next: `grpo.py`.

One idea: whoever trains, by whatever method, reads the same rows and gets the same reward.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
TRAIN, TEST = HERE / "sums_train.jsonl", HERE / "sums_test.jsonl"

PROMPT = "Q: {question}\nA:"
COMPLETION = " {answer}\n"
STOP = "\n"


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows `{question, answer, prompt, completion}`, all texts."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{**row, "prompt": PROMPT.format(**row), "completion": COMPLETION.format(**row)} for row in rows]


def exact_match(prompts: list[str], completions: list[str], answer: list[str], **columns) -> list[float]:
    """1 where a completion, cut at its first newline and stripped, equals the answer; else 0. One value a completion.

    The signature is that of TRL's reward functions: columns of the rows come by name, repeated for each completion."""
    return [
        float(completion.split(STOP)[0].strip() == right) for completion, right in zip(completions, answer, strict=True)
    ]
