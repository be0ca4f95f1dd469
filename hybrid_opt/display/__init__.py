"""Who is told of a run's events while it goes on. Reading order: `progress.py`, `run_so_far.py`, `dashboard.py`, `dashboard_lines.py`, `sparkline.py`,
`trackers.py`.
"""
