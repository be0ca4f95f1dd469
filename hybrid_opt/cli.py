"""The command line: train | check | plan | schema. Next: `config/loading.py`, then `training/build.py`.

One idea: a command only reads its arguments and shows results. Mistakes are UserErrors: their message is printed, nothing
else, and the exit status is 2. What needs torch is imported inside the command that needs it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from hybrid_opt.errors import UserError

app = typer.Typer(
    name="hybrid-opt",
    help="Fine-tune language models by mixing evolution strategies with backprop steps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunPath = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", show_default=False)]
Overrides = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="[section.field=value ...]", help="Replace values of the run file.", show_default=False),
]
SchedulePath = Annotated[
    Optional[str],
    typer.Option("--schedule", help="Schedule file or shipped recipe in place of the run file's.", show_default=False),
]


@app.command()
def train(
    run: RunPath,
    overrides: Overrides = None,
    schedule: SchedulePath = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
) -> None:
    """Train a model as a run file says."""
    if resume and overwrite:
        raise UserError("command line: --resume goes on with a run, --overwrite replaces it; give one of them")
    config, source = _load(run, overrides, schedule)
    _quiet()
    from rich.console import Console

    from hybrid_opt.config import located
    from hybrid_opt.training.build import build
    from hybrid_opt.training.progress import ProgressBar, summary_table

    console = Console()
    with located(source):
        trainer = build(config, overwrite=overwrite, resume=resume, display=ProgressBar(console))
        summary = trainer.train()
    console.print(summary_table(summary))
    if summary.finished:
        output = Path(config.output)
        for what, name in (("picture", "curves.png"), ("metrics", "metrics.jsonl"), ("model", "model")):
            console.print(f"{what}: {output / name}", highlight=False, soft_wrap=True)


@app.command()
def check(run: RunPath, overrides: Overrides = None, schedule: SchedulePath = None) -> None:
    """Validate a run file without training, and show which estimators may move which parameters."""
    from hybrid_opt.checking import check_data, policy_tables
    from hybrid_opt.config import located

    config, source = _load(run, overrides, schedule)
    with located(source):
        check_data(config.data)
        tables = list(policy_tables(config))
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table)
    console.print(f"{run}: valid", highlight=False, soft_wrap=True)


@app.command()
def plan(
    run: RunPath,
    overrides: Overrides = None,
    schedule: SchedulePath = None,
    steps: Annotated[Optional[int], typer.Option("--steps", min=1, help="Steps to show; left out: all.")] = None,
) -> None:
    """Show which estimators act when, without loading the model."""
    from rich.console import Console

    from hybrid_opt.checking import timeline

    config, _ = _load(run, overrides, schedule)
    for line in timeline(config, steps or config.training.steps):
        Console().print(line, highlight=False)


@app.command()
def schema(
    kind: Annotated[Literal["run", "schedule"], typer.Argument(help="Which file's schema.")] = "run",
) -> None:
    """Print the JSON schema of run files or schedule files, for editors that complete YAML with it."""
    from hybrid_opt.config import RunFile, ScheduleFile

    typer.echo(json.dumps((RunFile if kind == "run" else ScheduleFile).model_json_schema(), indent=2))


def _load(run: Path, overrides: list[str] | None, schedule: str | None):
    from hybrid_opt.config import load_run_and_source

    return load_run_and_source(run, overrides or (), schedule)


def _quiet() -> None:
    """Libraries' own chatter would tear the progress display; what they warn of is reported here in our words."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    if not torch.cuda.is_available():  # otherwise DeepSpeed, which transformers imports to save a model, warns of it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def main() -> None:
    """Entry point of `hybrid-opt` and `python -m hybrid_opt`."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
