"""Comparisons. `arms.py`, then `ablate.py`: of ways of training; `bench_plan.py`, then `bench.py`: of the speed of steps."""
