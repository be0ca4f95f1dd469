"""Models: where their weights come from (`loading.py`) and what parameters they have (`inventory.py`). Next: `loading.py`."""
