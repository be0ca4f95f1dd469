"""A program that kills a training run again and again, each time at another moment, and resumes it: see `test_killed.py`.

Each life of the run is a fork of this process, in which nothing has been computed yet; so a life takes milliseconds to begin, and no
thread is lost in the fork.
"""

import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import deepspeed  # noqa: F401  transformers imports it to save a model: here once for all lives
import torch
from safetensors.torch import load_file

from hybrid_opt.config.keeping import Keeping
from hybrid_opt.display.progress import Silence
from hybrid_opt.recovery import ledger
from hybrid_opt.run_files.run_folder import RunFolder
from hybrid_opt.training.trainer import Trainer
from tests.conftest import imports_are_done, tiny_model, token_batch, token_losses

STEPS = 12
ES = {"type": "es", "population_size": 6, "learning_rate": 1e-2, "update": {"type": "adam"}}
ADAMW = {"type": "backprop", "learning_rate": 1e-2}
MOMENTUM = {"type": "spsa", "learning_rate": 1e-2, "wrappers": [{"type": "momentum", "window": 3}]}
GUIDED = {"type": "guided", "pairs": 3, "learning_rate": 1e-2, "sigma": 1e-2, "perturbation": {"type": "dense"}}
RUNS = {
    "es": ({"es": ES}, {"type": "single", "estimator": "es"}, Keeping()),
    "es, whole checkpoints": ({"es": ES}, {"type": "single", "estimator": "es"}, Keeping(replay_at_most=0)),
    "switch": (
        {"es": MOMENTUM, "backprop": ADAMW},
        {"type": "alternate", "pattern": {"backprop": 2, "es": 3}},
        Keeping(snapshots="switch"),
    ),
    "every step": (
        {"guided": GUIDED, "backprop": ADAMW},
        {"type": "alternate", "pattern": {"backprop": 1, "guided": 3}},
        Keeping(snapshots=1, keep_checkpoints=1),
    ),
}
KILLS = 50
MOMENTS = ("fsync", "replace", "write", "mkdir", "rmtree")
"""Calls at which a life may end, besides any moment that a timer hits."""


def train(run: str, folder: Path) -> None:
    """One life: from the latest checkpoint, if there is one, to the end; leaves the final model."""
    torch.set_num_threads(1)
    if RunFolder(folder).finished():  # killed while it cleared up
        return
    estimators, schedule, keeping = RUNS[run]
    Trainer(
        tiny_model(),
        token_losses,
        [token_batch()],
        schedule={"estimators": estimators, "schedule": schedule},
        steps=STEPS,
        checkpoint_every=3,
        keeping=keeping,
        output=folder,
        overwrite=not has_checkpoint(folder),
        resume=has_checkpoint(folder),
        config={"model": {"name": "tiny"}},
        display=Silence(),
    ).train()


def has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("checkpoints/step-*"))


def live(run: str, folder: Path, *, dying: Callable[[], None] = lambda: None, after: float | None = None) -> bool:
    """Whether a life came to its end; it may arrange its own death, or be killed after so many seconds."""
    child = os.fork()
    if not child:
        faulthandler.dump_traceback_later(60, exit=True)  # a life that hangs tells where
        try:
            dying()
            train(run, folder)
        except BaseException as error:
            print(f"{run}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a life ended in an error")
    return os.WIFEXITED(status)


def die_before(call: str, number: int, folder: Path) -> None:
    """Let this process kill itself at a call, counted from 0; a `write` to the ledger ends in the middle of a line."""
    left = number

    def counted(function):
        def counting(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                if function is ledger.encoded:
                    line = function(*arguments)
                    with (folder / "ledger.jsonl").open("ab") as file:
                        file.write(line[: len(line) // 2].encode())
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counting

    home, name = {"write": (ledger, "encoded"), "rmtree": (shutil, "rmtree")}.get(call, (os, call))
    setattr(home, name, counted(getattr(home, name)))


def main(folder: Path) -> None:
    """Kill each kind of run at many moments; print how often at which."""
    imports_are_done()
    draw, counts = random.Random(0), dict.fromkeys(("timer", *MOMENTS), 0)
    for run in RUNS:
        begun = time.monotonic()
        assert live(run, folder / f"{run} whole")
        lasts = time.monotonic() - begun
        broken, killed = folder / f"{run} killed", 0
        while killed < KILLS / len(RUNS):
            moment, number, after = draw.choice([*counts]), draw.randrange(20), draw.uniform(0.1, 0.9) * lasts
            ended = (
                live(run, broken, after=after)
                if moment == "timer"
                else live(run, broken, dying=partial(die_before, moment, number, broken))
            )
            counts[moment] += not ended
            killed += not ended
            if ended:  # begin again: the next kills hit another run
                compare(folder, run)
                shutil.rmtree(broken)
        live(run, broken)
        compare(folder, run)
    print(json.dumps(counts))


def compare(folder: Path, run: str) -> None:
    """Whether the killed run has the uninterrupted one's weights."""
    whole, killed = (load_file(folder / f"{run} {how}/model/model.safetensors") for how in ("whole", "killed"))
    for name, weights in whole.items():
        assert torch.equal(weights, killed[name]), f"{run}: {name} differs"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
