"""What makes a run outlive its process. Reading order: `documents.py`, `records.py`, `ledger.py`, `replaying.py`, then `checkpoint.py`, `keeping.py`, and
`export.py`."""
