"""Ctrl-C and SIGTERM as a request to stop after the current step. Next: `trainer.py`."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Inside, the first SIGINT or SIGTERM only makes the given function answer True; a second SIGINT stops at once.

    Outside the main thread, where Python lets nobody handle signals, the function always answers False.
    """
    requested = False

    def request(number, frame):
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("stopping after the current step; Ctrl-C again stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
