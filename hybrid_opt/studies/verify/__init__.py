"""`hybrid-opt verify`: what theory says of the estimators, and what they do on this machine.

Reading order: `quantity.py`, `known_losses.py`, `sampling.py`, then the checks: `errors.py`, `guided.py`, `shaping.py`, `descent.py`,
`independence.py`, `exactness.py`, `rounding.py`; `registry.py`, which lists them; `real_model.py`, `writing.py`.
"""
