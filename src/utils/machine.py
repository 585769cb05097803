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
