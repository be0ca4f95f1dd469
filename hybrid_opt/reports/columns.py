"""Columns that the tables of runs and of studies share. Next: `run_sections.py`, `ablation_table.py`."""

from hybrid_opt.reports.content import Column
from hybrid_opt.reports.wording import count, number

STEPS = Column("steps", "steps", count)
SECONDS = Column("seconds", "seconds", number)
AMOUNTS = (
    Column("forwards", "forwards", count),
    Column("backwards", "backwards", count),
    Column("forward_equivalents", "forward-equivalents", count),
    Column("tokens", "tokens", count),
)
"""What the steps have taken, beside time and memory."""
