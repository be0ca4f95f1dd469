"""What `hybrid-opt evaluate` measures: models on sets of rows. Next: `subject.py`."""
