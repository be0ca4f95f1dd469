"""Going on with a run: what `--resume` may say, and the command that goes on. Next: `runs.py`.

One idea: who was interrupted copies one line. It is the command that was given, with the launcher's part of it where one can be seen.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

CHOICES = ("newest", "auto")
LAUNCHERS = ("deepspeed", "torchrun", "accelerate")
PROCESSES = Path("/proc")


def complete_resume(arguments: list[str]) -> None:
    """`--resume` may stand alone, which typer's options cannot: it becomes `--resume=newest`."""
    for i, argument in enumerate(arguments[: _options_end(arguments)]):
        if argument == "--resume":
            has_value = arguments[i + 1 : i + 2] and arguments[i + 1] in CHOICES
            arguments[i] = f"--resume={arguments.pop(i + 1) if has_value else CHOICES[0]}"
            return


def _options_end(arguments: Sequence[str]) -> int:
    """Where `--` ends the options, or all end."""
    return arguments.index("--") if "--" in arguments else len(arguments)


def command_that_resumes(arguments: Sequence[str]) -> tuple[str, str]:
    """A line that leads to it, and the command alone on its line.

    Args:
        arguments: this process's.
    """
    if "LOCAL_RANK" in os.environ:
        if launched := _launcher():
            return "go on with", _resumed(launched)
        return "start as before, but with", _resumed(_own(arguments))
    return "go on with", _resumed(_own(arguments))


def _own(arguments: Sequence[str]) -> list[str]:
    program, *rest = arguments
    return [*(("python", "-m", "hybrid_opt") if program.endswith("__main__.py") else ("hybrid-opt",)), *rest]


def _resumed(command: Sequence[str]) -> str:
    """The command with `--resume` in place of what it said of the run that may be there."""
    kept = list(command)
    complete_resume(kept)
    kept = [part for part in kept if part != "--overwrite" and not part.startswith("--resume=")]
    kept.insert(_options_end(kept), "--resume")
    return shlex.join(kept)


def _launcher() -> list[str] | None:
    """The command of the launcher among the processes that started this one; None: it is on another machine, or cannot be seen."""
    process, found = os.getppid(), None
    while process > 1:
        try:
            command = (PROCESSES / str(process) / "cmdline").read_text().split("\0")[:-1]
            process = int((PROCESSES / str(process) / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
        names = [Path(part).name for part in command[:2]]  # a script is its interpreter's first argument
        if place := next((i for i, name in enumerate(names, 1) if name in LAUNCHERS), 0):
            found = [names[place - 1], *command[place:]]
    return found
