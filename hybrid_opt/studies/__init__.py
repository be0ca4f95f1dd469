"""Measurements of the package itself. `bench_plan.py`: what the command `bench` measures; `bench.py`: how."""
