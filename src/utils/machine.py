"""What a timing has to be read with."""

from __future__ import annotations

import contextlib
import platform


def processor_name() -> str:
    """Model of the processor, as the system knows it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return name
