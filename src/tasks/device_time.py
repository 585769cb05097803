"""Time that a device takes for a part of its work."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seconds_now(device: torch.device) -> float:
    """Seconds of a clock, once the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


class DeviceTime:
    """Adds up the time that a device takes for a part of its work.

    On CUDA it is measured by events, without synchronisation; elsewhere the host waits for the work.

    Args:
        device: what does the work, on its current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure the work that is queued within."""
        if self._device.type != "cuda":
            begin = seconds_now(self._device)
            yield
            self._seconds += seconds_now(self._device) - begin
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._pending.append((begin, end))
        # in order: no more events are kept than there is work in the queue
        while self._pending and self._pending[0][1].query():
            self._add()

    def seconds(self) -> float:
        """Seconds so far; waits for the work."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._add()
        return self._seconds

    def _add(self) -> None:
        begin, end = self._pending.popleft()
        self._seconds += begin.elapsed_time(end) / 1e3
