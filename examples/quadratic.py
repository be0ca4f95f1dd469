"""The six nouns by hand, on a quadratic bowl: the minimum is found by ES steps with an exact step in between.

    python examples/quadratic.py

An Objective is minimised by Estimators, which a Policy lets move some parameters and a Schedule lets act at some steps; an
Engine holds the weights. What the loop at the end does is what `HybridOptimizer` does, and a Trainer is a loop around it.
"""

import torch
from torch import nn

from hybrid_opt import BackpropEstimator, Contribution, EsEstimator, FunctionObjective, LocalEngine, Signals, StepKey
from hybrid_opt.config.estimators import Backprop
from hybrid_opt.config.probing import EvolutionStrategy
from hybrid_opt.config.schedule import Alternate, Rule
from hybrid_opt.engines.update_rules import Sgd
from hybrid_opt.scheduling.policy import resolve
from hybrid_opt.scheduling.schedule import build_schedule

# The model: f(x) = W x + b. The data come from W = diag(1, 2, 3), b = (1, 1, 1), so the lowest loss is 0.
model = nn.Linear(3, 3)
nn.init.zeros_(model.weight)
nn.init.zeros_(model.bias)
x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
y = x * torch.tensor([1.0, 2.0, 3.0]) + 1.0

# Objective: a loss for each example.
objective = FunctionObjective(lambda model, batch: (model(batch[0]) - batch[1]).pow(2).sum(dim=1))

# Estimators: both give an estimate of the same gradient, one of them without ever taking a gradient.
es_config = EvolutionStrategy(type="es", population_size=16, sigma=0.01, fitness_shaping="none", learning_rate=0.05)
backprop_config = Backprop(type="backprop", optimizer="SGD", learning_rate=0.1)
estimators = {"es": EsEstimator(es_config), "backprop": BackpropEstimator(backprop_config)}

# Policy: ES may move everything, backprop only the weight.
rules = [Rule(match="bias", use=("es",)), Rule(match="weight", use=("es", "backprop"))]
policy = resolve(rules, ["weight", "bias"], list(estimators), where="policy")

# Schedule: four steps of ES, one of backprop.
schedule = build_schedule(Alternate(type="alternate", pattern={"es": 4, "backprop": 1}))

# Engine: the weights, and an optimizer for what backprop may move.
engine = LocalEngine(model, backprop_config, policy.names("backprop"), device="cpu")
rules_of = {"es": (0.05, Sgd()), "backprop": (0.1, None)}  # learning rate; None: by the engine's optimizer

signals = Signals()
for step in range(100):
    contributions = []
    for name, weight in schedule.plan(step, signals).items():
        names = policy.names(name)
        estimate, cost = estimators[name].estimate(engine, objective, (x, y), names, StepKey(0, step, name))
        contributions.append(Contribution(estimate, weight, names, *rules_of[name]))
    engine.apply(contributions, step)
    if step % 10 == 9:
        print(f"step {step + 1:3}  {name:8}  loss {cost.loss:.6f}")

print(f"W = {model.weight.tolist()}\nb = {model.bias.tolist()}")
print("final loss", objective.losses(model, (x, y)).mean().item())
