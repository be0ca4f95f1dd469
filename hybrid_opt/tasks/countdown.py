"""Countdown: reach a target from some numbers with + - * /, each used once. Next: `sampling.py`.

One idea: a row is built from its own solution, so every row can be solved; a completion's expression is worked out by
`expressions.py` and compared exactly.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from hybrid_opt.config.tasks import Countdown
from hybrid_opt.tasks.completions import CLOSE, OPEN, last_answer, text_of
from hybrid_opt.tasks.expressions import ExpressionError, evaluate
from hybrid_opt.tasks.sampling import drawn

COLUMNS = ("numbers", "target", "prompt", "answer")
PROMPT = (
    "Combine the numbers {numbers} into an expression whose value is {target}. You may use +, -, *, / and parentheses, and must use "
    "each number exactly once. Think inside <think> </think> tags, then write the expression inside <answer> </answer> tags, for "
    "example <answer> (1 + 2) / 3 </answer>.\n<think>"
)
BETWEEN = "</think>\n<answer>"


def countdown(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    numbers: Sequence[Sequence[int]],
    target: Sequence[int],
    **columns: Any,
) -> list[float]:
    """`0.1 * format + answer`, from 0 to 1.1 (TRL's reward function).

    *format*: 1 where the text is `<think>...</think>`, a new line, `<answer>...</answer>` and nothing else; otherwise 0.1 if it
    holds `<think>...</think>`, plus 0.5 if it holds `<answer>...</answer>`. The text is the completion, after `<think>` where the
    prompt ends with that. *answer*: 1 where the last `<answer>...</answer>` holds an expression that uses every number exactly
    once and has the target as its value, else 0.

    Source: ES at Scale (arXiv 2509.24372), `countdown_grader.py` of its code. That runs the expression in Python and compares with
    a tolerance of 1e-5; here it is parsed and compared exactly, and Python's `**` and `//` are refused. That always puts `<think>`
    in front, as its prompts all end with it.
    """
    return [
        0.1 * format_score(_opening(prompt) + text_of(completion)) + answer_score(text_of(completion), given, wanted)
        for prompt, completion, given, wanted in zip(prompts, completions, numbers, target, strict=True)
    ]


def _opening(prompt: Any) -> str:
    return "<think>" if text_of(prompt).rstrip().endswith("<think>") else ""


def format_score(text: str) -> float:
    """The *format* of `countdown`: 0, 0.1, 0.5, 0.6 or 1."""
    ended = text.removesuffix("\n")
    between = ended.find(BETWEEN, len("<think>"))
    if ended.startswith("<think>") and ended.endswith(CLOSE) and 0 <= between <= len(ended) - len(BETWEEN + CLOSE):
        return 1.0
    return 0.1 * _holds(text, "<think>", "</think>") + 0.5 * _holds(text, OPEN, CLOSE)


def _holds(text: str, opening: str, closing: str) -> bool:
    start = text.find(opening)
    return start >= 0 and text.find(closing, start) >= 0


def answer_score(text: str, numbers: Sequence[int], target: int) -> float:
    """The *answer* of `countdown`: 0 or 1."""
    try:
        value, used = evaluate((last_answer(text) or "").strip())
    except ExpressionError:
        return 0.0
    return float(sorted(used) == sorted(numbers) and value == target)


def candidates(task: Countdown) -> Iterator[tuple[str, dict[str, Any]] | None]:
    """Problems with their rows, in random order; None where a solution's value is no target."""
    choices = [task.largest] * task.numbers
    for left in range(task.numbers, 1, -1):
        choices += [left, left - 1, len(task.operators)]
    size = 1
    for choice in choices:
        size *= choice
    for number in drawn(size, task.seed):
        digits = []
        for choice in choices:
            number, digit = divmod(number, choice)
            digits.append(digit)
        yield _problem(task, digits)


def _problem(task: Countdown, digits: list[int]) -> tuple[str, dict[str, Any]] | None:
    """The problem with a certain solution, given by its numbers and, for each operation, the two operands and the operator."""
    numbers, steps = [1 + digit for digit in digits[: task.numbers]], digits[task.numbers :]
    parts = [str(number) for number in numbers]
    for i in range(0, len(steps), 3):
        left, right = parts.pop(steps[i]), parts.pop(steps[i + 1])
        parts.append(f"({left} {task.operators[steps[i + 2]]} {right})")
    solution = parts[0][1:-1]
    try:
        target, _ = evaluate(solution)
    except ExpressionError:
        return None
    if target.denominator != 1 or not 1 <= target <= task.largest_target:
        return None
    row = {"numbers": numbers, "target": int(target), "answer": solution}
    prompt = PROMPT.format(numbers=", ".join(map(str, numbers)), target=row["target"])
    return f"countdown {sorted(numbers)} {target}", {**row, "prompt": prompt}
