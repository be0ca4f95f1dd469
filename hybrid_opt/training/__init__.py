"""Runs. Reading order: `build.py`, `trainer.py`, `deciding.py`, `attribution.py`, `divergence.py`, `hybrid_optimizer.py`, `updates.py`, then what a
run leaves behind: `journal.py`, `messages.py`, `presence.py`, `run_folder.py`, `summary.py`, `curves.py`, and `run_status.py`."""
