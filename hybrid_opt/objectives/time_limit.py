"""A time limit for code that may hang. Next: `../tasks/scorers.py`, judges that cannot.

One idea: an alarm signal breaks into Python code wherever it is, into a search by a hopeless regular expression and a sleep as well. Where
there is no alarm (outside the main thread, on Windows), the code runs in a thread that is left behind when its time is over.
"""

import signal
import threading
from collections.abc import Callable
from typing import Any


class TimedOut(BaseException):
    """Time is over. No Exception, so that a function's own `except Exception` does not swallow it."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"took longer than the timeout of {seconds:g} s")


def call_within(seconds: float, call: Callable[[], Any]) -> Any:
    """What the call returns, or raises.

    Raises:
        TimedOut: it took longer than so many seconds.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        return call_in_thread(seconds, call)

    inside = True

    def ring(number: int, frame: Any) -> None:
        if inside:
            raise TimedOut(seconds)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)  # again and again, should the code catch everything
    try:
        try:
            return call()
        finally:
            inside = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def call_in_thread(seconds: float, call: Callable[[], Any]) -> Any:
    """The same from a thread, which goes on, unheard, when its time is over."""
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimedOut(seconds)
    returned, value = outcome[0]
    if not returned:
        raise value
    return value
