"""Energy, from counters as Linux shows them."""

import torch

from hybrid_opt.config import load_schedule
from hybrid_opt.machine import energy
from hybrid_opt.training.hybrid_optimizer import HybridOptimizer
from tests.conftest import tiny_model, token_batch, token_losses


def write(folder, **microjoules):
    for name, value in microjoules.items():
        place = folder / name.replace("_", ":")
        place.mkdir(exist_ok=True)
        (place / "energy_uj").write_text(f"{value}\n")


def test_packages_are_added_and_their_parts_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    write(tmp_path, **{"intel-rapl_0": 5_000_000, "intel-rapl_1": 1_000_000, "intel-rapl_0_0": 3_000_000})
    meter = energy.EnergyMeter(torch.device("cpu"))
    assert meter.read() == 0
    write(tmp_path, **{"intel-rapl_0": 7_500_000, "intel-rapl_1": 1_250_000, "intel-rapl_0_0": 9_000_000})
    assert meter.read() == 2.75
    write(tmp_path, **{"intel-rapl_0": 100_000, "intel-rapl_1": 2_250_000})  # the first has wrapped round
    assert meter.read() == 3.75
    (tmp_path / "intel-rapl:1/energy_uj").write_text("nobody knows")
    assert meter.read() == 3.75


def test_it_is_read_only_for_a_schedule_that_goes_by_it(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    es = {"type": "es", "population_size": 4, "learning_rate": 1e-3, "fitness_shaping": "none"}
    single = {"type": "single", "estimator": "es"}
    until = {
        "type": "phases",
        "phases": [{"until": {"signal": "joules", "above": 1.5}, "schedule": single}, {"schedule": single}],
    }
    assert load_schedule({"estimators": {"es": es}, "schedule": until}).signals == {"joules"}
    for schedule, joules in ((single, 0.0), (until, 2.0)):
        write(tmp_path, **{"intel-rapl_0": 0})

        def losses(model, batch):
            write(tmp_path, **{"intel-rapl_0": 2_000_000})
            return token_losses(model, batch)

        optimizer = HybridOptimizer(tiny_model(), losses, schedule={"estimators": {"es": es}, "schedule": schedule})
        optimizer.step(token_batch())
        assert optimizer.signals.joules == joules
        assert optimizer.acting() == ["es"]
    assert optimizer.schedule.phase == 1
