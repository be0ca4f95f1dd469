"""What holds to the last bit, or to float32's rounding. Next: `rounding.py`.

One idea: nothing is random here, so one number decides.
"""

from collections.abc import Iterator

import torch

from hybrid_opt.perturbations.contract import Member
from hybrid_opt.studies.verify.known_losses import Known, TiedLoss
from hybrid_opt.studies.verify.quantity import Quantity, exactly
from hybrid_opt.studies.verify.sampling import DENSE, Trials, estimated, estimator_of

CYCLES = 100


def restored_weights(trials: Trials) -> Iterator[Quantity]:
    """After 100 estimates every weight is bitwise what it was. Adding noise and subtracting it again moves bfloat16 weights by 3.9 %."""
    forms = {
        "dense": DENSE,
        "dense, whole model": {"type": "dense", "backup": "model"},
        "low rank": {"type": "low_rank"},
    }
    for dtype in (torch.float32, torch.bfloat16):
        for title, form in forms.items():
            known = Known(TiedLoss(dtype=dtype))
            before = {name: p.detach().clone() for name, p in known.engine.parameters.items()}
            estimator = estimator_of(type="spsa", sigma=0.1, perturbation=form)
            for cycle in range(CYCLES):
                estimated(estimator, known, trials.key(cycle))
            changed = sum((p != before[name]).sum().item() for name, p in known.engine.parameters.items())
            narrow = str(dtype).removeprefix("torch.")
            yield exactly(f"weights changed by {CYCLES} estimates, {title}, {narrow}", 0, changed)


def tied_weights(trials: Trials) -> Iterator[Quantity]:
    """A weight used in two places is one parameter with one noise: a member's losses are those of a model into which its weights are
    written once."""
    for title, form, tolerance in (("dense", DENSE, 0.0), ("low rank", {"type": "low_rank"}, 1e-5)):
        known, written = Known(TiedLoss()), Known(TiedLoss())
        perturbation = estimator_of(type="spsa", sigma=0.1, perturbation=form).perturbation
        key, every = trials.key(0).fold(0), torch.arange(len(known.batch))[None]
        with torch.no_grad():
            arguments = (known.engine, known.objective, known.batch, known.names, [Member(key, 1)], every)
            losses = perturbation.evaluate(*arguments)
            for shard in written.engine.shards(written.names):
                perturbation.add_noise([key], torch.tensor([0.1]), shard, shard.data)
            expected = written.loss(written.batch)
        difference = (losses[0] - expected).abs().max().item()
        yield exactly(f"largest difference by a tied weight, {title}", 0.0, difference, tolerance)
    yield exactly("parameters of a model whose head is its embedding", 3, len(known.names))


def forward_slopes(trials: Trials) -> Iterator[Quantity]:
    """Slopes by forward-mode differentiation are `g.z`, g by backpropagation (Baydin et al., arXiv 2202.08587)."""
    known, tangents = Known(TiedLoss()), 20
    g = known.read(estimated(estimator_of(type="backprop"), known, trials.key(0))[0]).double()
    estimate = estimated(estimator_of(type="forward_gradient", tangents=tangents), known, trials.key(0))[0]
    slopes = torch.stack([g @ known.direction(estimate.perturbation, key).double() for key in estimate.keys])
    difference = (estimate.coefficients * tangents - slopes).abs().max().item()
    yield exactly("largest |JVP - g.z| / |g|", 0.0, difference / g.norm().item(), tolerance=1e-5)
