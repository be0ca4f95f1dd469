"""hybrid_opt inside other people's training loops. Reading order: `transformers.py`, `training_arguments.py`, `label_losses.py`,
`step_batches.py`."""
