"""Gradient estimates. Reading order: `contract.py`, `noise.py`, `shaping.py`, `perturbation.py`, `dense.py`, `low_rank.py`,
`member_hooks.py`, `es.py`, `modes.py`, `backprop.py`, `stale_gradient.py`, `followers.py`."""
