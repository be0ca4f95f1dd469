"""Comparisons. Reading order: `arms.py`, `ablate.py`: of ways of training; `bench_plan.py`, `bench.py`: of the speed of steps; `verify/`: of estimators
and theory; `evaluate/`: of models on rows."""
