"""Tests; folders as in hybrid_opt."""

import gc

gc.disable()  # until conftest's `imports_are_done`; see hybrid_opt.cli.starting
