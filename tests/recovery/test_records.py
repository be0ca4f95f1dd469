"""What a step leaves behind brings the weights back, bit for bit, without evaluating anything."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from hybrid_opt.engines.ranks import Ranks
from hybrid_opt.errors import UserError
from hybrid_opt.recovery.checkpoint import load_checkpoint, save_checkpoint
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from tests.conftest import tiny_model, token_batch, token_losses

DENSE = {"perturbation": {"type": "dense"}}
SPSA = {"type": "spsa", "pairs": 2, "learning_rate": 1e-2}
ES = {"type": "es", "population_size": 6, "learning_rate": 1e-2}


def with_wrappers(estimator: dict, *wrappers: dict) -> dict:
    return {**estimator, "wrappers": list(wrappers)}


ESTIMATORS = {
    "es low rank": ES,
    "es one-sided": {**ES, "antithetic": False, "fitness_shaping": "centered_rank", "population_size": 7},
    "es adam": {**ES, "update": {"type": "adam"}},
    "es momentum rule": {**ES, "update": {"type": "momentum"}, "anchor": 0.1},
    "spsa dense": {**SPSA, **DENSE},
    "spsa orthogonal": {**SPSA, "perturbation": {"type": "dense", "distribution": "orthogonal"}},
    "spsa sphere": {**SPSA, "perturbation": {"type": "dense", "distribution": "sphere"}},
    "lazy subspace": {**SPSA, "perturbation": {"type": "lazy_subspace", "noise_rank": 2, "refresh": 3}},
    "align": {"type": "align", "pairs": 2, "learning_rate": 1.0},
    "fzoo reuse": {"type": "fzoo", "population_size": 4, "reuse": True, "learning_rate": 1e-3, **DENSE},
    "forward_gradient": {"type": "forward_gradient", "tangents": 2, "learning_rate": 1e-2},
    "layer_subset": with_wrappers(ES, {"type": "layer_subset", "layers": 1}),
    "mask of small weights": with_wrappers({**SPSA, **DENSE}, {"type": "sparse_mask", "keep": 0.3, "refresh": 2}),
    "mask at random": with_wrappers({**SPSA, **DENSE}, {"type": "sparse_mask", "keep": 0.3, "by": "random", "refresh": 2}),
    "mask in layers": with_wrappers(
        {**SPSA, **DENSE}, {"type": "sparse_mask", "keep": 0.3, "refresh": 2}, {"type": "layer_subset", "layers": 1}
    ),
    "relative_sigma": with_wrappers(ES, {"type": "relative_sigma", "refresh": 2}),
    "norm_cap": with_wrappers(ES, {"type": "norm_cap", "norm": 0.01}),
    "momentum": with_wrappers(ES, {"type": "momentum", "window": 3}),
    "momentum of a lazy subspace's layers": with_wrappers(
        {**SPSA, "perturbation": {"type": "lazy_subspace", "noise_rank": 2, "refresh": 2}},
        {"type": "layer_subset", "layers": 1},
        {"type": "momentum", "window": 3},
    ),
    "control_variate": with_wrappers(ES, {"type": "control_variate", "refresh": 3, "terms": 2}),
}  # fmt: skip


def optimizer_of(estimator: dict, **more) -> HybridOptimizer:
    schedule = {"estimators": {"own": estimator}, "schedule": {"type": "single", "estimator": "own"}, **more}
    return HybridOptimizer(tiny_model(), token_losses, schedule=schedule, seed=3)


def weights_of(optimizer: HybridOptimizer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in optimizer.engine.parameters.items()}


def documents_of(optimizer: HybridOptimizer, steps: int) -> list[dict]:
    """The records of so many steps, through JSON."""
    taken = [optimizer.step(token_batch()).record.document(optimizer.engine) for _ in range(steps)]
    return json.loads(json.dumps(taken))


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_records_bring_back_every_bit(kind, tmp_path):
    """Of the weights alone, and with what else the next step depends on, which a light checkpoint holds."""
    trained = optimizer_of(ESTIMATORS[kind])
    documents = documents_of(trained, 3)
    light = save_checkpoint(tmp_path, 3, Ranks(), lambda place: trained.state_dict(weights=False), base=0)
    resumed = optimizer_of(ESTIMATORS[kind])
    start = weights_of(resumed)
    for document in documents:
        resumed.replay(document)
    resumed.load_state_dict(load_checkpoint(light))
    documents += documents_of(trained, 3)
    documents_of(resumed, 3)
    replayed = optimizer_of(ESTIMATORS[kind])
    for document in documents:
        replayed.replay(document)
    assert replayed.signals.step == 6
    for name, weights in weights_of(trained).items():
        assert torch.equal(weights_of(replayed)[name], weights), name
        assert torch.equal(weights_of(resumed)[name], weights), name
    assert any(not torch.equal(start[name], weights) for name, weights in weights_of(trained).items())


@pytest.mark.filterwarnings("ignore:these parameters")
def test_a_parameter_that_was_not_perturbed_low_rank_is_remembered_as_such():
    """Which one that is only an evaluation shows, and a replay makes none."""

    class Borrows(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return functional.linear(self.one(x), self.two.weight)

    estimators = {"own": {**SPSA, "perturbation": {"type": "low_rank", "otherwise": "dense"}}}
    schedule = {"estimators": estimators, "schedule": {"type": "single", "estimator": "own"}}

    def optimizer() -> HybridOptimizer:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return HybridOptimizer(Borrows(), lambda m, batch: m(batch["x"]).square().mean(1), schedule=schedule)

    trained, again = optimizer(), optimizer()
    for _ in range(2):
        document = trained.step({"x": torch.eye(4)}).record.document(trained.engine)
        assert document["parts"][0]["sums"][0]["exceptions"] == {"two.weight": "dense", "two.bias": "dense"}
        again.replay(document)
    assert all(torch.equal(weights_of(again)[name], w) for name, w in weights_of(trained).items())


def test_a_replayed_step_is_no_drift():
    schedule = {"estimators": {"own": ES}, "schedule": {"type": "single", "estimator": "own"}}
    one, other = (HybridOptimizer(tiny_model(), token_losses, schedule=schedule, check_drift_every=1) for _ in range(2))
    _first, second = documents_of(one, 2)
    other.step(token_batch())
    other.replay(second)
    other.step(token_batch())
    one.step(token_batch())
    assert all(torch.equal(weights_of(one)[name], weights) for name, weights in weights_of(other).items())


def test_records_of_another_policy_are_refused():
    (document,) = documents_of(optimizer_of(ES), 1)
    other = optimizer_of(ES, policy=[{"match": "embed", "use": "frozen"}, {"match": ".*", "use": ["own"]}])
    with pytest.raises(UserError, match="step 0 of the ledger was taken under another policy"):
        other.replay(document)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["parts", 0, "sums", 0, "keys"], ["0,"], "1 keys have 12 bytes of coefficients"),
        (["parts", 0, "sums", 0, "coefficients"], "no base64!", "coefficients"),
        (["parts", 0, "estimator"], "other", "'other'"),
        (["parts", 0, "parameters"], [[0, 10**9]], "list index out of range"),
        (["parts", 0, "learning_rate"], "fast", "learning_rate"),
        (["parts"], None, "parts"),
    ],
)
def test_a_made_up_record_is_refused(place, value, message):
    optimizer = optimizer_of(ES)
    (document,) = documents_of(optimizer, 1)
    *way, last = place
    inner = document
    for key in way:
        inner = inner[key]
    inner[last] = value
    before = weights_of(optimizer)
    with pytest.raises(UserError, match=rf"step 0 of the ledger does not suit this run: .*{message}"):
        optimizer.replay(document)
    assert all(torch.equal(before[name], weights) for name, weights in weights_of(optimizer).items())


def test_what_does_not_draw_noise_has_no_record():
    blend = {"type": "blend", "weights": {"own": 0.5, "backprop": 1.0}}
    estimators = {"own": ES, "backprop": {"type": "backprop", "learning_rate": 1e-3}}
    optimizer = HybridOptimizer(tiny_model(), token_losses, schedule={"estimators": estimators, "schedule": blend})
    assert optimizer.step(token_batch()).record is None
