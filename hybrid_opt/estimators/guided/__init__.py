"""The estimator that probes along what backprop left behind. Reading order: `storage.py`, `span.py`, `designs.py`, `directions.py`,
`estimator.py`."""
