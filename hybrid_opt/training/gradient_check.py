"""`hybrid-opt check --gradients`: whether everything that backprop alone is to move has a gradient. Next: `missing_gradients.py`.

One idea: it takes the steps in which a run would find out, on weights that are thrown away.
"""

import tempfile
from collections.abc import Iterator

from hybrid_opt.config.engines import LocalEngine
from hybrid_opt.config.run import RunFile
from hybrid_opt.config.schedule import ScheduleFile, Single
from hybrid_opt.display.progress import Silence
from hybrid_opt.scheduling.policy import acting_in, policies_of
from hybrid_opt.training.build import build
from hybrid_opt.training.missing_gradients import LOOKS


def gradient_lines(run: RunFile, *, allow_code: bool = False) -> Iterator[str]:
    """Take steps of backprop alone under the policy of each phase in which it acts; what was found, a line a phase.

    Raises:
        UserError: parameters without a gradient, or anything that `build` refuses.
    """
    name = next((name for name, c in run.schedule.estimators.items() if c is run.schedule.backprop), None)
    phases = [phase for phase in policies_of(run.schedule) if name and name in acting_in(run.schedule.schedule, phase)]
    if not phases:
        yield "gradients: no backprop acts, so none are needed"
    for phase in phases:
        yield _looked_at(
            _with_backprop_alone(run, name, phase), "" if phase is None else f" in phase {phase}", allow_code
        )


def _looked_at(run: RunFile, during: str, allow_code: bool) -> str:
    name = run.schedule.schedule.estimator
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(run.model_copy(update={"output": f"{folder}/none"}), allow_code=allow_code, display=Silence())
    batches, optimizer = trainer.own_batches.get(name, trainer.batches), trainer.optimizer
    optimizer.missing.looks_at_all = True
    for step in range(LOOKS):
        optimizer.step(batches.batch_at(step))
    missing, owned = optimizer.missing.found, optimizer.may_move(name)
    line = f"gradients: {len(owned) - len(missing)} of the {len(owned)} tensors that {name} may move{during} have one"
    return line + (f"; without are {', '.join(missing)}" if missing else "")


def _with_backprop_alone(run: RunFile, name: str, phase: int | None) -> RunFile:
    _, rules = policies_of(run.schedule)[phase]
    alone: ScheduleFile = run.schedule.model_copy(
        update={"policy": rules, "schedule": Single(type="single", estimator=name)}
    )
    training = run.training.model_copy(update={"memory_budget": None, "divergence": None})
    engine = LocalEngine(type="local", device=getattr(run.engine, "device", "auto"))
    return run.model_copy(update={"schedule": alone, "training": training, "engine": engine, "report_to": "none"})
