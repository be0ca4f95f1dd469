"""Notices within seconds that another rank has ended. Next: `zero.py`.

One idea: every rank counts up in a shared store, and watches the others' counts from a thread of its own, because its main
thread may be waiting for a dead rank in a collective operation without end.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from hybrid_opt.engines.ranks import Ranks, lost

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
    watch = Watch(store, ranks)
    watch.start()
    return watch


class Watch(threading.Thread):
    """Ends this process, with a message, when another one has not been heard of for `PATIENCE` seconds."""

    def __init__(self, store: dist.Store, ranks: Ranks):
        super().__init__(daemon=True, name="rank watch")
        self.store, self.ranks = store, ranks
        self.others = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
        self._over = threading.Event()

    def run(self) -> None:
        """Count up and look at the others, until `stop`."""
        seen = {rank: (-1, time.monotonic()) for rank in self.others}
        while not self._over.wait(EVERY):
            try:
                self.store.add(f"alive {self.ranks.rank}", 1)
                for rank in self.others:
                    count = self.store.add(f"alive {rank}", 0)
                    if count != seen[rank][0]:
                        seen[rank] = (count, time.monotonic())
                    elif time.monotonic() - seen[rank][1] > PATIENCE and not self.store.add(f"done {rank}", 0):
                        self._end(rank)
            except (RuntimeError, ConnectionError):  # the store lives in rank 0
                if not self._over.wait(PATIENCE):  # unless it had done its work, and this one is about to end, too
                    self._end(0)

    def stop(self) -> None:
        """This rank has nothing more to exchange: whoever looks for it later must not think that it died."""
        self._over.set()
        with contextlib.suppress(RuntimeError, ConnectionError):
            self.store.add(f"done {self.ranks.rank}", 1)

    def _end(self, rank: int) -> None:
        print(f"error: {lost(self.ranks.rank, rank)}", file=sys.stderr, flush=True)
        os._exit(1)
