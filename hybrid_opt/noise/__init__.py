"""Noise that is a function of a key and an index. Reading order: `keys.py`, `drawing.py`, `numba_kernels.py`, `torch_kernels.py`."""
