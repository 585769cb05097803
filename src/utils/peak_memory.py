"""Memory that one call takes."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak of the memory that one call allocates, its output counted and its inputs not.

    On CUDA the caching allocator's peak. On the CPU the peak of live bytes from PyTorch's allocator, as its profiler
    records every allocation and release; scratch space that BLAS libraries take from the system is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # or the profiler writes about its start, and about a GPU that is not there, to stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    live = peak = 0
    for _, change in sorted((item.start_ns(), item.nbytes()) for item in events if item.name() == "[memory]"):
        live += change
        peak = max(peak, live)
    return peak
