"""How random directions change the weights. Reading order: `contract.py`, `build.py`, `directions.py`, `rehearsal.py`, `swapping.py`,
`dense.py`, `sides.py`, `factors.py`, `member_hooks.py`, `low_rank.py`."""
