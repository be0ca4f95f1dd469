"""The folder of a run: what is written there, by whom, and how it stands. Reading order: `run_folder.py`, `journal.py`, `metrics.py`, `messages.py`,
`presence.py`, `locking.py`, `durable.py`, `json_lines.py`, `summary.py`, `curves.py`, `run_status.py`.
"""
