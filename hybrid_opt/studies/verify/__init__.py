"""`hybrid-opt verify`: what theory says of the estimators, and what they do on this machine.

Reading order: `quantity.py`, `known_losses.py`, `sampling.py`; the checks `errors.py`, `guided.py`, `guided_toy.py`, `shaping.py`,
`descent.py`, `independence.py`, `exactness.py`, `rounding.py`; `registry.py`, which lists them; for a model and data of the user's
`subject.py`, `real_model.py`, `laws.py`; `writing.py`.
"""
