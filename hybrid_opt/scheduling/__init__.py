"""Who acts when, on what, and how strongly. Reading order: `policy.py`, `signals.py`, `schedule.py`, `adaptive.py`,
`learning_rate.py`, `turns.py`."""
