"""How completions are written: prompts -> tokens. Reading order: `contract.py`, `decoding.py`, `prefill.py`, `choosing.py`,
`adapters.py`, `served_weights.py`, `vllm.py`."""
