"""Ctrl-C and SIGTERM as a request to stop after the current step. Next: `trainer.py`."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ECHO, ECHO_OF_LAUNCHER = 0.3, 2.0
"""Seconds in which further signals are the first one once more: a terminal sends Ctrl-C to every process of a job, and then
whoever started them (a launcher, `uv run`, `make`) passes it on to the same processes."""


@contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Inside, the first SIGINT or SIGTERM only makes the given function answer True; a later SIGINT stops at once.

    Outside the main thread, where Python lets nobody handle signals, the function always answers False.
    """
    first: float | None = None
    echo = ECHO_OF_LAUNCHER if "LOCAL_RANK" in os.environ else ECHO

    def request(number: int, frame: Any) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            say("stopping after the current step or evaluation, and saving; Ctrl-C again stops at once")
        elif number == signal.SIGINT and time.monotonic() - first > echo:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: first is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
