"""Configuration: what run files and schedule files may say. Imports no torch, so `--help` and `check` answer at once.

Reading order: `strict.py`, `perturbations.py`, `wrappers.py`, `steps.py`, `probing.py`, `align.py`, `fzoo.py`, `guided.py`,
`forward_gradient.py`, `estimators.py`, `triggers.py`, `adaptive.py`, `schedule.py`, `data.py`, `tasks.py`, `objectives.py`, `rewards.py`, `run.py`,
`evaluation.py`, `study.py`, `loading.py`, `explaining.py`.
"""

from hybrid_opt.config.explaining import located
from hybrid_opt.config.loading import load_run, load_run_and_source, load_schedule, load_study, recipes
from hybrid_opt.config.run import RunFile
from hybrid_opt.config.schedule import ScheduleFile
from hybrid_opt.config.study import StudyFile

__all__ = [
    "RunFile",
    "ScheduleFile",
    "StudyFile",
    "load_run",
    "load_run_and_source",
    "load_schedule",
    "load_study",
    "located",
    "recipes",
]
