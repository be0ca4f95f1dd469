"""hybrid_opt inside other people's training loops. Next: `transformers.py`."""
