"""The command for a run that others see from outside: status. Next: `recovering.py`."""

import typer

from hybrid_opt.cli.recovering import RunFolderPath


def status(run: RunFolderPath) -> None:
    """Tell how a run stands: whether it is alive, its step and rate, when it will end, what was saved, and what it said."""
    from hybrid_opt.run_files.run_status import status_lines

    for word, text in status_lines(run):
        typer.echo(f"{word:<10} {text}")
