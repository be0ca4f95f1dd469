"""Commands for what a run left behind to be made again: replay | export. Next: `studies.py`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from hybrid_opt.cli.arguments import AllowCode, quiet, rank
from hybrid_opt.cli.starting import importing
from hybrid_opt.errors import UserError

RunFolderPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="The run's output folder, or an export.", show_default=False)
]


def replay(
    run: RunFolderPath,
    to_step: Annotated[
        Optional[int], typer.Option("--to-step", min=0, help="Steps to take; left out: all.", show_default=False)
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", help="Where the model goes; left out: RUN/replayed.", show_default=False),
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """Make the model after any step of a run again from its ledger, without evaluating anything."""
    place = output or run / "replayed"
    with importing():
        quiet()
        from rich.console import Console

        from hybrid_opt.models.loading import load_tokenizer
        from hybrid_opt.recovery.replaying import read_run, refuse_present
        from hybrid_opt.recovery.replaying import replay as replay_run
        from hybrid_opt.training.save_model import save_model

    if rank() == 0:
        refuse_present(place)
    console = Console(quiet=rank() > 0)
    with console.status("replaying ...") as status:
        found = replay_run(run, to_step, allow_code=allow_code, say=status.update)
    place.mkdir(parents=True, exist_ok=True)
    save_model(found.optimizer.engine, load_tokenizer(read_run(run).model), place)
    found.optimizer.engine.leave()
    start = f"the snapshot of step {found.base}" if found.base else "the model at the start"
    console.print(
        f"step {found.step}: {start} and {found.step - found.base} steps of the ledger", highlight=False, soft_wrap=True
    )
    console.print(f"model: {place / 'model'}", highlight=False, soft_wrap=True)


def export(
    run: RunFolderPath,
    ledger: Annotated[bool, typer.Option("--ledger", help="As the start's model and a ledger.")] = False,
    output: Annotated[
        Optional[Path], typer.Option("--output", help="New folder; left out: RUN/export.", show_default=False)
    ] = None,
) -> None:
    """Ship a fine-tune whose steps are all in the ledger as the model it started from and a small file."""
    if not ledger:
        raise UserError(f"command line: say what to export: --ledger (the whole model is in {run / 'model'} already)")
    from hybrid_opt.recovery.export import export as export_run

    made = export_run(run, output or run / "export")
    typer.echo(f"{made.steps} steps in {made.bytes:,} bytes: {made.folder}")
    typer.echo(f"use it as model.name={made.folder}, or make its model: hybrid-opt replay {made.folder}")
