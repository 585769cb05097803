"""What a timing has to be read with."""

from __future__ import annotations

import contextlib
import os
import platform

import torch


def processor_name() -> str:
    """Model of the processor, as the system knows it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return name


def usable_cpus() -> int:
    """Number of CPUs that this process may use."""
    # sched_getaffinity knows of taskset and of containers pinned to CPUs, but does not exist on every system.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_info(device: torch.device) -> dict[str, str | int | None]:
    """What a figure has to be read with: processor, threads, versions, GPU."""
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
