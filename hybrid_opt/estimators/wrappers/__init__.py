"""What may be put around an estimator. Reading order: `build.py`, `layer_subset.py`, `norm_cap.py`, `momentum.py`,
`relative_sigma.py`, `sparse_mask.py`, `control_variate.py`."""
