"""What a run will take, before anything of it is loaded: memory, computing, exchange and time. Next: `prediction.py`."""
