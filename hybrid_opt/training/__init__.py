"""Runs. Reading order: `build.py`, `hybrid_optimizer.py`, `trainer.py`, then what a run leaves behind: `checkpoint.py`,
`run_folder.py`, `summary.py`, `curves.py`."""
