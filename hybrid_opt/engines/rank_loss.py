"""Notices within a minute that another rank has ended or stands still. Next: `zero.py`.

One idea: every rank counts up in a shared store, and watches the others' counts from threads of its own, because its main
thread may be waiting for a dead rank in a collective operation without end.
"""

import atexit
import contextlib
import os
import socket
import sys
import threading
from datetime import timedelta

import torch.distributed as dist

from hybrid_opt.engines.ranks import Ranks, lost
from hybrid_opt.errors import error_line

EVERY = 5.0
"""Seconds between looks."""
PATIENCE = 40.0
"""Seconds without a sign of life after which a rank counts as lost."""


def watch(ranks: Ranks) -> "Watch":
    """Start watching; to be called by all ranks together."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store = None
    if ranks.rank == 0:
        store = dist.TCPStore(host, 0, ranks.world_size, is_master=True, wait_for_workers=False)
    port = [store.port if store else None]
    dist.broadcast_object_list(port, src=0, device=ranks.device)
    if store is None:
        store = dist.TCPStore(
            socket.gethostbyname(host), port[0], ranks.world_size, is_master=False, timeout=timedelta(seconds=PATIENCE)
        )
    return Watch(store, ranks)


class Watch:
    """Ends this process, with a message, when it needs another one that has not been heard of for `PATIENCE` seconds.

    One thread talks to the store, which lives in rank 0 and no longer answers when that stands still; the other counts how
    often nothing was heard. It counts its own looks, not seconds, so that a job that was suspended as a whole goes on.
    """

    def __init__(self, store: dist.Store, ranks: Ranks) -> None:
        self.store, self.ranks = store, ranks
        self.missed = {rank: 0 for rank in range(ranks.world_size) if rank != ranks.rank}
        self._over = threading.Event()
        self.threads = [threading.Thread(target=job, daemon=True) for job in (self._listen, self._count)]
        for thread in self.threads:
            thread.start()
        atexit.register(self.stop)  # a thread that is in the store when Python goes away would crash the process

    def stop(self) -> None:
        """This rank exchanges nothing more, so it does not mind who ends."""
        self._over.set()
        for thread in self.threads:
            thread.join(timeout=EVERY)

    def _listen(self) -> None:
        heard: dict[int, int] = {}
        with contextlib.suppress(RuntimeError, ConnectionError):  # the store went with rank 0: silence from now on
            while not self._over.wait(EVERY):
                self.store.add(f"alive {self.ranks.rank}", 1)
                for rank in self.missed:
                    count = self.store.add(f"alive {rank}", 0)
                    if count != heard.get(rank):
                        heard[rank], self.missed[rank] = count, 0

    def _count(self) -> None:
        while not self._over.wait(EVERY):
            for rank in self.missed:
                self.missed[rank] += 1
            silent = [rank for rank, times in self.missed.items() if times * EVERY > PATIENCE]
            if silent and self.ranks.needed.is_set():
                sys.stderr.write(error_line(lost(f"rank {silent[0]}"), self.ranks.rank) + "\n")
                sys.stderr.flush()
                os._exit(1)  # the main thread cannot be reached
