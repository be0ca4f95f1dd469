"""Code that a run file names, and whether it may run. Next: `loading.py`.

One idea: a run file may come from somebody else, so nothing that it names is imported unless the person who starts the run says so, with
`--allow-code` or `build(run, allow_code=True)`. Here alone stands what counts as code.
"""

from collections.abc import Iterable, Iterator

from hybrid_opt.config.objectives import Function, Objective
from hybrid_opt.config.rewards import FUNCTION, Reward
from hybrid_opt.config.run import Model, RunFile
from hybrid_opt.errors import UserError

Named = tuple[str, str]
"""A key of the run file, and the code that its value names."""


def code_of(run: RunFile) -> Iterator[Named]:
    """All code that training a run would execute beside this package's and its dependencies' own."""
    yield from code_of_model(run.model)
    yield from code_of_objective(run.objective, "objective")
    for name, own in run.objectives.items():
        yield from code_of_objective(own.objective, f"objectives.{name}.objective")


def code_of_model(model: Model) -> Iterator[Named]:
    """Python files that come with a model's weights; even its parameters' names are known only by running them."""
    if model.trust_remote_code:
        yield "model.trust_remote_code", f"what comes with {model.name or 'the model'}"


def code_of_objective(objective: Objective, key: str) -> Iterator[Named]:
    """Functions of the user's own, and what vLLM would import.

    Args:
        key: of the objective in its file.
    """
    if isinstance(objective, Function):
        yield f"{key}.function", objective.function
    if not isinstance(objective, Reward):
        return
    for number, judge in enumerate(objective.rewards):
        if FUNCTION.fullmatch(judge.function):
            yield f"{key}.rewards.{number}.function", judge.function
    # vLLM imports classes by name (worker_cls, logits_processors, ...), runs models' own code, and writes to folders (download_dir).
    for argument, value in objective.generation.engine_arguments.items():
        plain = isinstance(value, (bool, int, float)) or argument == "dtype"
        if argument == "trust_remote_code" or not plain:
            yield f"{key}.generation.engine_arguments.{argument}", f"what vLLM makes of {value!r}"


def refuse_code(named: Iterable[Named], allowed: bool) -> None:
    """Raise UserError, naming the first of it, if there is code and nobody has allowed it."""
    for key, what in named if not allowed else ():
        raise UserError(
            f"{key}: {what} is code, which would run with all your rights; look at it, and if you trust it say --allow-code (in Python: "
            "allow_code=True)"
        )
