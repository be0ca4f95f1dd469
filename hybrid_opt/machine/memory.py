"""Memory of the device and of this process. Next: `../training/memory_budget.py`, `../perturbations/forward_size.py`, which go by it."""

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")
FORGET_PEAK = Path("/proc/self/clear_refs")
M_MMAP_THRESHOLD = -3
"""The number of this option in glibc's malloc.h."""
CGROUP = Path("/sys/fs/cgroup")


def peak_memory_bytes(device: torch.device) -> int:
    """On CUDA the most memory allocated on the device so far, elsewhere the process's largest resident size so far.

    0 where the operating system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():  # Linux: getrusage would count what the parent process had before this one was started
        return _kilobytes(STATUS, "VmHWM")
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory_bytes` begin anew from what is used at present; where the system does not allow that, it goes on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif FORGET_PEAK.exists():
        with contextlib.suppress(OSError):  # some containers forbid it
            FORGET_PEAK.write_text("5")  # 5: set VmHWM back to the present size, says proc(5)


def present_memory_bytes(device: torch.device) -> int | None:
    """What `peak_memory_bytes` would be if it were reached now; None where the operating system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _kilobytes(STATUS, "VmRSS") if STATUS.exists() else None


def total_memory_bytes() -> int | None:
    """Main memory of the machine, or of the process's container if that is less; None where the system does not tell."""
    if not MEMINFO.exists():
        return None
    try:
        return min(_kilobytes(MEMINFO, "MemTotal"), int((CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):
        return _kilobytes(MEMINFO, "MemTotal")


def return_freed_memory() -> None:
    """From now on let freed blocks of 128 kB and more go back to the system at once, where the C library is glibc. It would keep most of
    them for later, up to 32 MB each, so that a process is up to a third larger than what it uses, and its peak says little."""
    if sys.platform == "linux" and (set_option := getattr(ctypes.CDLL(None), "mallopt", None)):
        set_option(M_MMAP_THRESHOLD, 1 << 17)


def release_memory(device: torch.device) -> None:
    """Give back to the system what is not used any more but still held by this process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim", None):  # glibc has it
        trim(0)


def free_memory_bytes(device: torch.device, limit: int | None = None) -> int:
    """Memory that this process could still allocate on a device, until `peak_memory_bytes` would be above a limit.

    On CUDA what is free and what torch holds in reserve; on Linux what is available to the machine, or to the process's
    container if that is less; elsewhere 4 GiB, because the operating system has no common way to tell."""
    if limit is not None:
        return max(0, min(free_memory_bytes(device), limit - (present_memory_bytes(device) or 0)))
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    if not MEMINFO.exists():
        return 4 << 30
    return min(_kilobytes(MEMINFO, "MemAvailable"), _left_in_container())


def _left_in_container() -> int:
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    try:
        return max(0, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return sys.maxsize


def _kilobytes(file: Path, field: str) -> int:
    """A line such as `VmHWM:   12345 kB`, in bytes; 0 if there is none."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
