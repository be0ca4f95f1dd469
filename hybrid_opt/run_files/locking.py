"""Locks on files, which end with the process that has them, however it ends. Next: `presence.py`."""

from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

EXIST = fcntl is not None
"""Whether the operating system has such locks; a file system may lack them all the same."""


def lock(file: IO, *, shared: bool = False) -> bool:
    """Whether this process has the lock on an open file now, as long as the file is open; False: another process has it.

    Args:
        shared: several processes may have it, but none beside one that has it for itself.

    Raises:
        OSError: the file system has no locks.
    """
    if not EXIST:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
