"""Learning rates against transformers' schedulers stepped on an optimizer, and against formulas."""

import math
from typing import get_args

import pytest
import torch
from transformers import get_scheduler

from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.steps import LearningRateScheduleName
from hybrid_opt.scheduling.learning_rate import learning_rate_at

STEPS, PEAK = 20, 3e-3


def rates(name: str, warmup: int, steps: int = STEPS) -> list[float]:
    config = Backprop(type="backprop", learning_rate=PEAK, learning_rate_schedule=name, warmup_steps=warmup)
    at = learning_rate_at(config, steps)
    return [at(step) for step in range(steps)]


CASES = [(name, warmup) for name in get_args(LearningRateScheduleName) for warmup in (0, 1, 6) if name != "constant"]


@pytest.mark.parametrize(("name", "warmup"), [("constant", 0), *CASES])
def test_rates_equal_those_of_a_stepped_optimizer(name, warmup):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], lr=PEAK)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS)
    expected = []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        weight.sum().backward()
        optimizer.step()
        scheduler.step()
    assert rates(name, warmup) == pytest.approx(expected, rel=1e-12, abs=0)


FORMULAS = {
    "constant_with_warmup": lambda s, w: 1.0,
    "linear": lambda s, w: (STEPS - s) / (STEPS - w),
    "cosine": lambda s, w: 0.5 * (1 + math.cos(math.pi * (s - w) / (STEPS - w))),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("warmup", [0, 4])
def test_rates_equal_formulas(name, warmup):
    expected = [PEAK * (s / warmup if s < warmup else FORMULAS[name](s, warmup)) for s in range(STEPS)]
    assert rates(name, warmup) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_constant_is_the_peak_and_the_course_is_stretched_over_the_run():
    assert rates("constant", 0) == [PEAK] * STEPS
    assert rates("linear", 0, steps=40)[::2] == pytest.approx(rates("linear", 0))


def test_a_rate_depends_on_the_step_alone():
    config = Backprop(type="backprop", learning_rate=PEAK, learning_rate_schedule="cosine", warmup_steps=3)
    at = learning_rate_at(config, STEPS)
    assert [at(step) for step in (9, 2, 19, 9)] == [rates("cosine", 3)[step] for step in (9, 2, 19, 9)]
    assert type(at(5)) is float
