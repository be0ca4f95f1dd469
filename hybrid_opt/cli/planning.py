"""The command plan. Next: `../planning/checking.py`, `../planning/prediction.py`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

from hybrid_opt.cli.arguments import AllowCode, Overrides, SchedulePath, load, quiet
from hybrid_opt.cli.starting import importing
from hybrid_opt.errors import UserError

LONGEST_PLAN = 100_000
"""Steps; a second or two."""


def plan(
    run: Annotated[
        Optional[Path],
        typer.Argument(
            metavar="RUN.yaml", help="The run file (with --model-config: another model).", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    schedule: SchedulePath = None,
    steps: Annotated[Optional[int], typer.Option("--steps", min=1, help="Steps to show; left out: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only who acts when, at what cost: answers at once.")] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Load the model and take five steps of each estimator, for times and measured peaks."
        ),
    ] = False,
    model_config: Annotated[
        Optional[list[str]],
        typer.Option(
            "--model-config",
            help="Instead of a run file: which sizes of model fit, such as qwen3-0.6b 8b 32b.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="Of --model-config: a device such as h100-80gb, or 24GB.")
    ] = "h100-80gb",
    world_size: Annotated[int, typer.Option("--world-size", min=1, help="Processes, each with a device.")] = 1,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Of --model-config: examples on each device.")
    ] = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Of --model-config: tokens of each example.")] = 512,
    as_json: Annotated[
        Optional[Path], typer.Option("--json", help="Write the predicted numbers to this file too.")
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """Show which estimators act when, and what a run takes in memory, computing and exchange, before the model is loaded."""
    if model_config:
        _sizes(
            [*model_config, *([str(run)] if run else []), *(overrides or [])], device, world_size, batch_size, tokens
        )
        return
    if run is None:
        raise UserError("command line: name a run file, or sizes of a model by --model-config")
    config, source = load(run, overrides, schedule)
    from rich.console import Console

    from hybrid_opt.config import located
    from hybrid_opt.config.foreign_code import code_of_model, refuse_code
    from hybrid_opt.planning.checking import cost_table, timeline

    with located(source):
        refuse_code(code_of_model(config.model), allow_code)
    if (steps := steps or config.training.steps) is None:
        raise UserError(f"{run}: training.steps: its budget decides how many steps there will be; say --steps 40")
    if steps > LONGEST_PLAN:
        raise UserError(
            f"{run}: training.steps: {steps:,} steps are too many to look at one by one; say --steps {LONGEST_PLAN}"
        )
    console = Console()
    for line in timeline(config, steps):
        console.print(line, highlight=False)
    with located(source):
        console.print(cost_table(config), highlight=False)
        if quick:
            return
        with importing():
            quiet()
            from hybrid_opt.planning.report import planned
        for part in planned(
            config, steps, world_size, calibrate=calibrate, allow_code=allow_code, write=_writer(as_json)
        ):
            console.print(part, highlight=False)


def _sizes(names: list[str], device: str, world_size: int, batch_size: int, tokens: int) -> None:
    with importing():
        quiet()
        from rich.console import Console

        from hybrid_opt.planning.sizes import sizes_table
    console = Console()
    for part in sizes_table(names, device, world_size, batch_size, tokens):
        console.print(part, highlight=False)


def _writer(path: Path | None) -> Callable[[dict], None]:
    def write(document: dict) -> None:
        from hybrid_opt.run_files.durable import write_atomically

        if path is not None:
            write_atomically(path, json.dumps(document, indent=2) + "\n")

    return write
