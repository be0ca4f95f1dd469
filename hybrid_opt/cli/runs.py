"""Commands for one run: train | check | schema. Next: `planning.py`, `studies.py`."""

import json
import sys
from typing import Annotated, Literal, Optional

import typer

from hybrid_opt.cli.arguments import AllowCode, Overrides, RunPath, SchedulePath, load, quiet, rank
from hybrid_opt.cli.resuming import command_that_resumes
from hybrid_opt.cli.starting import importing
from hybrid_opt.errors import UserError

PLAIN = {"highlight": False, "soft_wrap": True, "markup": False}
"""For lines that are to be copied."""


def train(
    run: RunPath,
    overrides: Overrides = None,
    schedule: SchedulePath = None,
    resume: Annotated[
        Optional[Literal["newest", "auto"]],
        typer.Option(
            "--resume",
            help="Go on from the newest checkpoint; newest may be left out. auto: if there is one, else start; a run that has finished is left as it is.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    display: Annotated[
        Literal["auto", "dashboard", "lines", "none"],
        typer.Option(help="How the run is shown; auto: as a dashboard on a terminal, by lines elsewhere."),
    ] = "auto",
    allow_code: AllowCode = False,
) -> None:
    """Train a model as a run file says."""
    if resume and overwrite:
        raise UserError("command line: --resume goes on with a run, --overwrite replaces it; give one of them")
    config, source = load(run, overrides, schedule)
    with importing():
        quiet()
        from rich.console import Console

        from hybrid_opt.config import located
        from hybrid_opt.run_files.run_folder import RunFolder

    console, folder = Console(quiet=rank() > 0), RunFolder(config.output)
    if resume == "auto":
        if finished := folder.finished():
            console.print(f"{config.output}: the run has finished, after {finished['steps']} steps", **PLAIN)
            return
        goes_on = folder.saved_step() is not None
        resume, overwrite = (
            ("newest", False) if goes_on else (None, True)
        )  # what there is has no checkpoint to go on from
    with located(source), importing():  # building imports the engine and the model's classes
        from hybrid_opt.display.dashboard import display_for
        from hybrid_opt.display.progress import summary_table
        from hybrid_opt.training.build import build

        shown = display_for(display, console, config.training.budget)
        trainer = build(config, allow_code=allow_code, overwrite=overwrite, resume=resume is not None, display=shown)
    with located(source):
        summary = trainer.train()
    console.print(summary_table(summary))
    if summary.finished:
        for what, place in (("picture", folder.curves), ("metrics", folder.metrics), ("model", folder.model)):
            if place.exists():
                console.print(f"{what}: {place}", **PLAIN)
    else:
        for line in command_that_resumes(sys.argv):
            console.print(line, **PLAIN)


def check(
    run: RunPath,
    overrides: Overrides = None,
    schedule: SchedulePath = None,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients",
            help="Load the model too, and look whether all that backprop alone is to move has a gradient.",
        ),
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Validate a run file without training, and show which estimators may move which parameters."""
    with importing():
        from hybrid_opt.config import located
        from hybrid_opt.config.foreign_code import code_of, code_of_model, refuse_code
        from hybrid_opt.config.reporting import refuse_missing_packages
        from hybrid_opt.objectives.checking import check_data
        from hybrid_opt.planning.checking import engine_notes, objective_lines, policy_tables

    config, source = load(run, overrides, schedule)
    with located(source):
        refuse_code(code_of_model(config.model), allow_code)  # nothing else that a run file names is needed here
        check_data(config)
        refuse_missing_packages(config.report_to)
        tables = [*policy_tables(config), *engine_notes(config), *objective_lines(config)]
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for table in tables:
        console.print(table, highlight=False, soft_wrap=not isinstance(table, Table))
    if gradients:
        with located(source), importing():
            quiet()
            from hybrid_opt.training.gradient_check import gradient_lines

            for line in gradient_lines(config, allow_code=allow_code):
                console.print(line, highlight=False, soft_wrap=True)
    elif config.schedule.backprop is not None:
        console.print("gradients: not looked at; --gradients loads the model and looks", highlight=False)
    for key, what in code_of(config):
        console.print(f"{key}: {what} is code; to train with it say --allow-code", highlight=False, soft_wrap=True)
    console.print(f"{run}: valid", highlight=False, soft_wrap=True)


def schema(
    kind: Annotated[Literal["run", "schedule", "study"], typer.Argument(help="Which file's schema.")] = "run",
) -> None:
    """Print the JSON schema of run files, schedule files or study files, for editors that complete YAML with it."""
    from hybrid_opt.config import RunFile, ScheduleFile, StudyFile

    model = {"run": RunFile, "schedule": ScheduleFile, "study": StudyFile}[kind]
    typer.echo(json.dumps(model.model_json_schema(), indent=2))
