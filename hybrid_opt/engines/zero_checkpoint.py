"""DeepSpeed's own checkpoints, read without executing what is in them. Next: `zero_stages.py`.

One idea: DeepSpeed reads its files with `torch.load(..., weights_only=False)` (`TorchCheckpointEngine.load`), which runs whatever code a
file was made to hold. Here the same files are read as tensors, plain values, and the few classes of DeepSpeed's that it writes.
"""

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from hybrid_opt.errors import UserError

TAG = "deepspeed"
WRITTEN = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed's files hold beside tensors and plain values; none of them does more than keep what it is given."""


class TensorsOnly(TorchCheckpointEngine):
    """DeepSpeed's reader and writer of files, whose reader builds nothing but tensors, plain values and `WRITTEN`."""

    def load(self, path: str, map_location: Any = None) -> Any:
        """What `save` wrote.

        Raises:
            UserError: it cannot be read, or holds anything else.
        """
        try:
            with torch.serialization.safe_globals(WRITTEN):
                return torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # of zip archives, of pickles, of torch
            raise UserError(f"{path}: the checkpoint cannot be read: {_first_line(error)}") from None


def read_as_data(engine: Any) -> None:
    """Whoever lets DeepSpeed's engine read a checkpoint from now on, nothing in it is executed."""
    engine.checkpoint_engine = TensorsOnly(engine._config)


def save(engine: Any, folder: Path) -> None:
    """Let DeepSpeed's engine write its checkpoint; all ranks do this together."""
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)


def load(engine: Any, folder: Path) -> None:
    """Let DeepSpeed's engine read its checkpoint; all ranks do this together.

    Raises:
        UserError: a file is missing, damaged, or holds what DeepSpeed never writes.
    """
    read_as_data(engine)
    try:
        found, _ = engine.load_checkpoint(str(folder), tag=TAG)
    except UserError:
        raise
    except Exception as error:  # whatever DeepSpeed makes of files that are not there or say something else
        raise UserError(f"{folder / TAG}: the checkpoint cannot be read: {_first_line(error)}") from error
    if found is None:
        raise UserError(f"{folder / TAG}: the checkpoint cannot be read: its files are missing")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
