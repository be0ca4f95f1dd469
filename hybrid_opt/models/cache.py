"""The folder for what is expensive to make twice. Next: `loading.py`."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$HYBRID_OPT_CACHE`, else `hybrid_opt` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("HYBRID_OPT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid_opt"
