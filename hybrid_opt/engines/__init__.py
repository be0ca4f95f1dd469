"""Where the weights live and how they are moved. Reading order: `contract.py`, `update_rules.py`, `local.py`."""
