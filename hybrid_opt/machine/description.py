"""On what a run was made: machine and versions. Next: `../run_files/run_folder.py`."""

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hybrid_opt.machine.memory import total_memory_bytes

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "datasets", "numba", "numpy", "safetensors")
CPUINFO = Path("/proc/cpuinfo")


def describe_machine(device: torch.device, ranks: int) -> dict[str, Any]:
    """Machine, versions and the present time, in plain values."""
    return {
        "hybrid_opt": _version("hybrid-opt"),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": total_memory_bytes(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": ranks,
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in CPUINFO.read_text().splitlines() if CPUINFO.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
