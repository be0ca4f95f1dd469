"""The command line: train | check | plan | status | replay | export | ablate | report | evaluate | bench | verify | schema. Next: `runs.py`,
`planning.py`, `watching.py`, `recovering.py`, `studies.py`, `evaluating.py`, `measuring.py`, and `arguments.py`, `starting.py` that all share; then `../config/loading.py`, `../training/build.py`.

One idea: a command only reads its arguments and shows results. Mistakes are UserErrors: their message is printed, nothing
else, and the exit status is 2. What needs torch is imported inside the command that needs it.
"""

import os
import sys

import typer

from hybrid_opt.cli.arguments import rank
from hybrid_opt.cli.evaluating import evaluate
from hybrid_opt.cli.measuring import bench, verify
from hybrid_opt.cli.planning import plan
from hybrid_opt.cli.recovering import export, replay
from hybrid_opt.cli.resuming import complete_resume
from hybrid_opt.cli.runs import check, schema, train
from hybrid_opt.cli.studies import ablate, report
from hybrid_opt.cli.watching import status
from hybrid_opt.errors import UserError, error_line

app = typer.Typer(
    name="hybrid-opt",
    help="Fine-tune language models by mixing evolution strategies with backprop steps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, check, plan, status, replay, export, ablate, report, evaluate, bench, verify, schema):
    app.command()(command)

INTERRUPTED = 130
"""The exit status into which typer turns a KeyboardInterrupt: 128 and the signal's number, as shells have it."""


def _take_local_rank(arguments: list[str]) -> None:
    """The deepspeed launcher writes `--local_rank=N` in front of all other arguments; torchrun sets a variable instead."""
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("--local_rank", "--local-rank"):
            value = value if equals else "".join(arguments[i + 1 : i + 2])
            if not value.isdigit():
                raise UserError(
                    f"command line: {option} is followed by {value or 'nothing'!r}; write a number, as in {option}=0"
                )
            os.environ.setdefault("LOCAL_RANK", value)
            del arguments[i : i + (1 if equals else 2)]
            return


def main() -> None:
    """Entry point of `hybrid-opt` and `python -m hybrid_opt`."""
    try:
        _take_local_rank(sys.argv)
        complete_resume(sys.argv)
        app()
    except UserError as error:
        sys.stderr.write(error_line(error, rank()) + "\n")  # at once, or another rank's line may come in between
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("stopped", file=sys.stderr)
        raise
