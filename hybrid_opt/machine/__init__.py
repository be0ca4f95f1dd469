"""What the machine tells: memory, energy, itself. Reading order: `memory.py`, `energy.py`, `description.py`."""
