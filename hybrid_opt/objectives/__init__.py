"""What is minimised, and the data it is measured on. Reading order: `contract.py`, `data.py`, `template.py`,
`examples.py`, `causal_lm.py`, `choice.py`, `batches.py`; for rewards `reward.py`, `judging.py`, `time_limit.py`."""
