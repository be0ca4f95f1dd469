"""`hybrid-opt report`: what a run or a study did, for people to read. Reading route: `writing.py`, `reading.py`, `content.py`."""
