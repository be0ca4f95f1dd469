"""The processes of a run, called ranks, and the few numbers that they exchange. Next: `rank_loss.py`, `zero.py`.

One idea: what ranks exchange beside the weights' own traffic goes through this one object, so it can be counted, and one
process alone exchanges nothing.
"""

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_opt.errors import UserError

TIMEOUT = timedelta(minutes=30)
"""Longest wait for slower ranks: evaluations and checkpoints can take long. Dead ones are noticed much sooner."""


class RankLostError(UserError):
    """Another process of the run has ended, so nothing can be exchanged any more."""


def launched_world_size() -> int:
    """How many processes the launcher has started (deepspeed, torchrun); 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def free_port() -> str:
    """A port of this machine on which nobody listens, for processes to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. All methods that exchange something must be called by all ranks in the same order.

    Args:
        device: where the backend of torch.distributed wants its tensors.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"
    needed: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)
    """Set while this process does something for which it needs the others."""

    @property
    def on_this_machine(self) -> int:
        """How many ranks share this machine's memory."""
        here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun's name and deepspeed's
        return min(self.world_size, int(here or self.world_size))

    def deal(self, count: int, together: int = 1) -> list[list[int]]:
        """Numbers 0 to count - 1 for each rank, evenly, in runs of `together`; all ranks get equally many.

        Where they do not go up evenly, the last ranks get some numbers that others have too, so that all make as many
        forward passes.
        """
        groups = count // together
        each = -(-groups // self.world_size)
        first = [min(rank * groups // self.world_size, groups - each) for rank in range(self.world_size)]
        return [list(range(f * together, (f + each) * together)) for f in first]

    def gather(self, values: Tensor) -> Tensor:
        """Every rank's values, (world_size, ...)."""
        if self.world_size == 1:
            return values.unsqueeze(0)
        mine = values.to(self.device).contiguous()
        everybody = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everybody, mine)
        return torch.stack(everybody).to(values.device)

    def total(self, value: float) -> float:
        """The sum over all ranks, in float64."""
        return self.gather(torch.tensor(value, dtype=torch.float64)).sum().item()

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        return int(self.gather(torch.tensor(number)).min())

    def most(self, *numbers: float) -> list[float]:
        """The largest of all ranks' first numbers, of their second ones, ..., in one exchange."""
        return self.gather(torch.tensor(numbers, dtype=torch.float64)).amax(dim=0).tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is so for some rank."""
        return bool(self.gather(torch.tensor(flag)).any())

    def wait(self) -> None:
        """Until all ranks are here."""
        self.any(False)

    def same_for_all(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    @contextmanager
    def loss_reported(self) -> Iterator[None]:
        """Inside, the others are needed: the watch acts, and the backends' errors about a connection become a RankLostError."""
        outermost = not self.needed.is_set()
        self.needed.set()
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not _is_about_connection(error):
                raise
            raise RankLostError(f"{lost('another rank')} ({str(error).splitlines()[0].split('. ')[0]})") from error
        finally:
            if outermost:
                self.needed.clear()


def lost(who: str) -> str:
    """What to say when another rank has ended."""
    return (
        f"{who} has stopped, so this one stops too; look for its own message, then go on from the last checkpoint with the "
        "same command and --resume"
    )


def _is_about_connection(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(part in text for part in ("connection closed", "connection reset", "broken pipe", "gloo", "nccl"))
