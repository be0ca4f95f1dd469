"""What `hybrid-opt evaluate` measures: models on sets of rows. Reading order: `subject.py`, `measuring.py`, `table.py`."""
