"""Hardware and software versions, stored with results."""

from __future__ import annotations

import contextlib
import os
import platform

import torch


def processor_name() -> str:
    """Model name of the processor."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return name


def usable_cpus() -> int:
    """Number of CPUs that this process may use."""
    # sched_getaffinity respects taskset and containers pinned to CPUs, but does not exist on every system.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_info(device: torch.device) -> dict[str, str | int | None]:
    """Processor, threads, versions and GPU, stored with results."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "system": platform.platform(),
    }
