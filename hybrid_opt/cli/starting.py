"""How a command imports what it needs without waiting longer than it must. Next: `runs.py`.

torch, transformers and DeepSpeed make two million objects that all stay. The garbage collector would look through them again and again
while they grow, and once more when the process ends: a third of the time of a command that does little.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Inside, nothing is collected; what is there at the end is never looked at again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
