"""Runs. Reading order: `build.py`, `trainer.py`, `deciding.py`, `attribution.py`, `divergence.py`, `hybrid_optimizer.py`, `updates.py`; what a run writes
is `../run_files/`, what it shows `../display/`.
"""
