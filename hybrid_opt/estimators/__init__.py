"""Gradient estimates. Reading order: `contract.py`, `../noise/`, `../perturbations/`, `probing.py`, `fitness.py`, `shaping.py`, `es.py`,
`pairs.py`, `spsa.py`, `align.py`, `fzoo.py`, `guided/`, `forward_gradient.py`, `backprop.py`, `stale_gradient.py`, `followers.py`,
`wrappers/`."""
