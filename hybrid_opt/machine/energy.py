"""Energy that the device has taken, where it reports it. Next: `../scheduling/adaptive.py`, which weighs it."""

import time
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")
"""Where Linux shows the energy counters of Intel's and AMD's processors, for who may read them."""


class EnergyMeter:
    """Joules since it was made: on CUDA power times time, read at each call; on a CPU its packages' counters.

    Args:
        device: whose.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.joules, self.counters, self.at = 0.0, _counters(), time.perf_counter()

    def read(self) -> float:
        """Joules so far; 0 where nothing is reported."""
        now, counters = time.perf_counter(), _counters()
        if self.device.type == "cuda":
            self.joules += _watts(self.device) * (now - self.at)
        else:
            self.joules += sum(max(0.0, counters[name] - self.counters.get(name, 0.0)) for name in counters)
        self.at, self.counters = now, counters
        return self.joules


def _watts(device: torch.device) -> float:
    try:
        return torch.cuda.power_draw(device) / 1000
    except (ModuleNotFoundError, RuntimeError):  # no pynvml, or a driver that does not tell
        return 0.0


def _counters() -> dict[str, float]:
    """Joules of each package; a counter that wraps round to 0 is seen as no energy at that reading."""
    found = {}
    for file in RAPL.glob("intel-rapl:[0-9]*/energy_uj"):
        if file.parent.name.count(":") == 1:  # not of a package's parts, which are in its own
            try:
                found[file.parent.name] = int(file.read_text()) / 1e6
            except (OSError, ValueError):
                continue
    return found
