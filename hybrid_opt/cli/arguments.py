"""What commands share: arguments, loading a run, quiet libraries. Next: `runs.py`."""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:  # commands start without pydantic
    from hybrid_opt.config.explaining import Source
    from hybrid_opt.config.run import RunFile

RunPath = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", show_default=False)]
Overrides = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="[section.field=value ...]", help="Replace values of the run file.", show_default=False),
]
SchedulePath = Annotated[
    Optional[str],
    typer.Option("--schedule", help="Schedule file or shipped recipe in place of the run file's.", show_default=False),
]

AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Run the code that the run file names (module:function, trust_remote_code); look at it first.",
    ),
]


def load(run: Path, overrides: list[str] | None, schedule: str | None) -> "tuple[RunFile, Source]":
    """The run file that a command names, with its overrides, and where each key was written."""
    from hybrid_opt.config import load_run_and_source

    return load_run_and_source(run, overrides or (), schedule)


def quiet() -> None:
    """Libraries' own chatter would tear the progress display; what they warn of is reported here in our words."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's store warns with stack traces when a rank ends
    warnings.formatwarning = lambda message, *where: f"warning: {message}\n"
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed calls old names
    if rank():
        warnings.simplefilter("ignore")  # rank 0 says the same
    import torch

    if not torch.cuda.is_available():  # otherwise DeepSpeed, which transformers imports to save a model, warns of it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def rank() -> int:
    """This process's number among those that a launcher started."""
    return int(os.environ.get("RANK", 0))
